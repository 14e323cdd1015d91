"""Host memory as simulations have it: the budget holds, and nothing on lease leaves."""

import pytest

from tests.slots.situations import MIB, make_host
from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.budget import CpuBudget


def test_packs_leave_in_the_order_of_their_use() -> None:
    host = make_host(adapters=3, packs=[1, 2, 3])
    for batch in ([2], [1], [3]):
        host.used(batch)
    assert host.take(4, MIB) == [2]
    assert 2 not in host
    assert 4 in host


def test_as_many_leave_as_are_needed() -> None:
    host = make_host(size=5 * MIB, packs=[1, 2, 3, 4, 5])
    assert host.take(6, 2 * MIB) == [1, 2]
    assert host.take(7, 1 * MIB) == [3]
    assert host.bytes == 5 * MIB


def test_a_pack_on_lease_does_not_leave_though_it_is_the_oldest() -> None:
    host = make_host(adapters=3, packs=[1, 2, 3])
    assert host.take(4, MIB, frozenset({1, 2})) == [3]


@pytest.mark.parametrize(
    ("size", "protected"), [(2, {1, 2, 3}), (5, set())], ids=["leases", "larger than the budget"]
)
def test_without_enough_victims_nothing_changes(size: int, protected: set[int]) -> None:
    host = make_host(size=4 * MIB, packs=[1, 2, 3, 4])
    assert host.take(5, size * MIB, protected) is None
    assert (len(host), host.bytes) == (4, 4 * MIB)
    assert 5 not in host


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "8"], ids=repr)
@pytest.mark.parametrize("name", ["adapters", "bytes"])
def test_a_limit_must_be_a_positive_integer(name: str, limit: int) -> None:
    with pytest.raises(ConfigError, match=f"budget in {name} must be a positive integer or None"):
        CpuBudget(**{name: limit})
