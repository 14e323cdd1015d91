"""Host memory: the budget holds, and nothing on lease leaves."""

import pytest

from tests.slots.situations import MIB, make_host
from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.errors import HostMemoryFullError
from vllm_multilora.slots.host_tier import HostTier

NONE: frozenset[int] = frozenset()


def admit(host: HostTier, pack: int, size: int = MIB, protected: frozenset[int] = NONE):
    """Takes a pack in, and says who left for it."""
    victims = host.victims(size, protected)
    for victim in victims:
        host.drop(victim)
    host.take(pack, size)
    return victims


def test_nobody_leaves_while_there_is_room() -> None:
    host = make_host(adapters=2, packs=[1])
    assert host.has_room(10 * MIB)
    assert admit(host, 2) == ()
    assert not host.has_room(1)
    assert (len(host), host.bytes, dict(host.sizes)) == (2, 2 * MIB, {1: MIB, 2: MIB})


def test_packs_leave_in_the_order_of_their_use() -> None:
    host = make_host(adapters=3, packs=[1, 2, 3])
    for batch in ([2], [1], [3]):
        host.used(batch)
    assert admit(host, 4) == (2,)
    assert 2 not in host
    assert 4 in host


def test_as_many_leave_as_are_needed() -> None:
    host = make_host(size=5 * MIB, packs=[1, 2, 3, 4, 5])
    assert admit(host, 6, size=2 * MIB) == (1, 2)
    assert admit(host, 7, size=1 * MIB) == (3,)
    assert host.bytes == 5 * MIB


def test_a_pack_on_lease_does_not_leave_though_it_is_the_oldest() -> None:
    host = make_host(adapters=3, packs=[1, 2, 3])
    assert admit(host, 4, protected=frozenset({1, 2})) == (3,)


def test_what_is_asked_changes_nothing() -> None:
    host = make_host(adapters=1, packs=[1])
    assert host.victims(MIB, NONE) == host.victims(MIB, NONE) == (1,)
    assert 1 in host


def test_without_enough_victims_nothing_leaves_and_the_error_says_what_holds_the_room() -> None:
    host = make_host(size=4 * MIB, packs=[1, 2, 3, 4])
    with pytest.raises(
        HostMemoryFullError,
        match=r"no room in host memory for an adapter of 2.0 MiB within the budget \(4.0 MiB\): 3 "
        r"adapters with 3.0 MiB cannot be evicted now, because they are being read or copied into "
        r"slots; try again, or raise --max-cpu-loras or --multilora-cpu-cache-gib",
    ):
        host.victims(2 * MIB, frozenset({1, 2, 3}))
    assert len(host) == 4


def test_an_adapter_larger_than_the_budget_is_called_that() -> None:
    host = make_host(size=4 * MIB, packs=[1])
    with pytest.raises(HostMemoryFullError, match="it alone is larger than the budget"):
        host.victims(5 * MIB, NONE)


@pytest.mark.parametrize(
    ("pack", "size", "message"),
    [
        (2, 0, "size of pack 2 must be positive, got 0"),
        (1, MIB, "pack 1 is in host memory already"),
        (2, 2 * MIB, r"pack 2 of 2097152 bytes does not fit beside 1 packs of 1048576 bytes"),
    ],
    ids=["no size", "twice", "no room"],
)
def test_taking_what_cannot_be_taken_changes_nothing(pack: int, size: int, message: str) -> None:
    host = make_host(size=2 * MIB, packs=[1])
    with pytest.raises(ValueError, match=message):
        host.take(pack, size)
    assert (len(host), host.bytes) == (1, MIB)


def test_a_dropped_pack_leaves_its_room() -> None:
    host = make_host(adapters=1, packs=[1])
    host.drop(1)
    assert host.bytes == 0
    assert admit(host, 2) == ()
    with pytest.raises(KeyError):
        host.drop(1)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "8"], ids=repr)
@pytest.mark.parametrize("name", ["adapters", "bytes"])
def test_a_limit_must_be_a_positive_integer(name: str, limit: int) -> None:
    with pytest.raises(ConfigError, match=f"budget in {name} must be a positive integer or None"):
        CpuBudget(**{name: limit})
