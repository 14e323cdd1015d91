"""What is remembered of each adapter's use."""

import pytest

from vllm_multilora.slots import adapter_usage
from vllm_multilora.slots.adapter_usage import AdapterUsage, AdapterUse
from vllm_multilora.slots.events import Tier

FAILURE = "no such file"


def test_an_unknown_adapter_has_no_use() -> None:
    assert AdapterUsage().of(7) == AdapterUse()


def test_hits_loads_and_the_last_error_are_kept_by_adapter() -> None:
    seen = AdapterUsage()
    seen.failed(1, FAILURE)
    assert seen.of(1) == AdapterUse(last_error=FAILURE)
    seen.read(1, rank=8, size=100)
    seen.hit(Tier.CPU, 1)
    seen.hit(Tier.GPU, 1)
    seen.hit(Tier.GPU, 1)
    seen.read(2, rank=16, size=200)
    assert seen.of(1) == AdapterUse(gpu_hits=2, cpu_hits=1, loads=1, rank=8, size=100)
    seen.forget(1)
    assert seen.of(1) == AdapterUse()
    assert seen.of(2).rank == 16


def test_the_last_use_is_the_last_step_with_the_adapter() -> None:
    now = 0.0
    seen = AdapterUsage(clock=lambda: now)
    for step in ({1, 2}, {1, 2}, {2}, {2}):
        now += 1.0
        seen.step(step)
    assert [seen.of(i).last_used for i in (1, 2, 3)] == [2.0, 4.0, None]
    now = 5.0
    seen.step(set())
    assert seen.of(2).last_used == 4.0
    seen.step({2})
    seen.forget(2)
    assert seen.of(2).last_used is None


def test_memory_for_adapters_that_come_and_go_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_usage, "MAX_REMEMBERED", 3)
    seen = AdapterUsage()
    for number in range(5):
        seen.failed(number, FAILURE)
    assert [seen.of(number).last_error is None for number in range(5)] == [True, True, *[False] * 3]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> AdapterUsage:
    """Remembers three adapters, and has read the first."""
    monkeypatch.setattr(adapter_usage, "MAX_REMEMBERED", 3)
    seen = AdapterUsage()
    seen.read(1, rank=8, size=100)
    return seen


def test_failures_of_others_do_not_push_out_an_adapter_that_is_in_every_step(
    seen: AdapterUsage,
) -> None:
    for number in range(2, 12):
        seen.step({1, number})
        seen.failed(number, FAILURE)
    assert seen.of(1).loads == 1


def test_failures_of_others_do_not_push_out_an_adapter_that_is_used(seen: AdapterUsage) -> None:
    for number in range(2, 12):
        seen.failed(number, FAILURE)
        seen.hit(Tier.GPU, 1)
    assert seen.of(1) == AdapterUse(gpu_hits=10, loads=1, rank=8, size=100)
