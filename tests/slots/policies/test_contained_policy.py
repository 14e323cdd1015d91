"""A policy that fails is replaced, and nobody but the log notices."""

import logging
from typing import Any

import pytest

from tests.slots.situations import make_slots, run
from vllm_multilora.slots import CachePolicy
from vllm_multilora.slots.policies import contained_policy
from vllm_multilora.slots.policies.contained_policy import ContainedPolicy
from vllm_multilora.slots.policies.lru import LruPolicy


class Broken(LruPolicy):
    """Fails in one of its methods; before that it is LRU."""

    method = ""

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "method"):
            raise RuntimeError("out of order")
        return super().__getattribute__(name)


def broken(method: str) -> CachePolicy:
    policy = Broken()
    policy.method = method
    return policy


@pytest.mark.parametrize("method", ["added", "used", "removed", "victim"])
def test_slots_go_on_with_lru_whatever_fails(method: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = ContainedPolicy(broken(method))
    slots = make_slots(2, lambda: policy)
    with caplog.at_level(logging.ERROR):
        run(slots, [1], [2], [1], [], [3], [], [4], [3], [], [5], [])
    assert slots.contents in ((5, 3), (3, 5))
    (record,) = caplog.records
    assert "Cache policy Broken has failed and is replaced by LRU" in record.getMessage()
    assert "RuntimeError: out of order" in record.getMessage()


@pytest.mark.parametrize("method", ["added", "removed"])
def test_the_policy_in_its_place_knows_what_is_there_and_nothing_else(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[int] = []

    class Noted(LruPolicy):
        def added(self, adapter_id: int, size: int, cost: float) -> None:
            added.append(adapter_id)
            super().added(adapter_id, size, cost)

    monkeypatch.setattr(contained_policy, "LruPolicy", Noted)
    failing = Broken()
    policy = ContainedPolicy(failing)
    for adapter_id in (1, 2):
        policy.added(adapter_id, 1, 1.0)
    policy.removed(1)
    failing.method = method
    policy.added(3, 1, 1.0)
    policy.removed(3)
    assert added == ([2, 3] if method == "added" else [2])


class Stubborn(LruPolicy):
    def victim(self, candidates: Any) -> int:
        return 99


def test_a_choice_that_was_not_offered_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    policy = ContainedPolicy(Stubborn())
    slots = make_slots(1, lambda: policy)
    run(slots, [1], [], [2])
    assert slots.contents == (2,)
    assert "it chose 99 as victim, not one of [1]" in caplog.text


def test_a_policy_that_works_decides(caplog: pytest.LogCaptureFixture) -> None:
    policy = ContainedPolicy(LruPolicy())
    slots = make_slots(2, lambda: policy)
    run(slots, [2], [1], [], [3])
    assert slots.contents == (3, 1)
    assert not caplog.records
