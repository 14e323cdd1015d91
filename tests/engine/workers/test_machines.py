"""The stores of several machines as one: an adapter is there when all have it, and only then."""

import msgspec
import pytest

from tests.engine.fake_engine import FakeStore, pack_info
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.engine.workers.machines import MachineStores
from vllm_multilora.store.protocol.messages import (
    Evicted,
    Failed,
    Forgotten,
    Loaded,
    LoadRequest,
    Reading,
    Restarted,
    Totals,
)


def loaded(store: FakeStore, ticket: int, pack: int, digest: str = "same", *, keep=True) -> Loaded:
    """A machine's answer, with the lease that it gives."""
    del store.load_requests[ticket]
    if keep:
        store.leases[pack] += 1
    return Loaded(ticket, pack_info(pack, digest), 0.5, True, keep)


@pytest.fixture
def parts() -> list[FakeStore]:
    return [FakeStore(), FakeStore()]


@pytest.fixture
def stores(parts) -> MachineStores:
    return MachineStores(parts)


def load(stores: MachineStores, parts: list[FakeStore], packs: tuple[int, int]) -> Loaded:
    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1"))
    for store, pack in zip(parts, packs, strict=True):
        store.inbox.append(loaded(store, store.tickets, pack))
    (answer,) = stores.poll()
    assert answer.ticket == ticket
    return answer


def leases(parts: list[FakeStore]) -> list[int]:
    return [sum(store.leases.values()) for store in parts]


def test_an_adapter_is_loaded_when_the_last_machine_has_it(stores, parts):
    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1"))
    assert [store.load_requests[1].path for store in parts] == ["/adapters/1"] * 2
    parts[1].inbox.append(Reading(1))
    assert stores.poll() == [Reading(ticket)]
    parts[0].inbox.append(loaded(parts[0], 1, 30))
    assert stores.poll() == []
    parts[1].inbox.append(loaded(parts[1], 1, 70))
    (answer,) = stores.poll()
    assert (answer.ticket, answer.leased) == (ticket, True)
    assert [part.pack for part in stores.elsewhere(answer.pack.pack)] == [70]
    assert leases(parts) == [1, 1]
    stores.release(answer.pack.pack)
    assert leases(parts) == [0, 0]


def test_leases_are_kept_in_the_order_of_the_machines(stores, parts):
    """What comes before its turn is asked for again when that has come."""
    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1", fresh=True))
    parts[1].inbox.append(loaded(parts[1], 1, 70))
    assert stores.poll() == []
    assert leases(parts) == [0, 0]
    parts[0].inbox.append(msgspec.structs.replace(loaded(parts[0], 1, 30), was_read=False))
    assert stores.poll() == []
    assert parts[1].only() == LoadRequest(1, "a", "/adapters/1", ticket=2), (
        "it has been read freshly"
    )
    again = loaded(parts[1], 2, 70)
    parts[1].inbox.append(msgspec.structs.replace(again, seconds=0.0, was_read=False))
    (answer,) = stores.poll()
    assert (answer.ticket, answer.was_read, answer.seconds) == (ticket, True, 0.5)
    assert leases(parts) == [1, 1]


def test_no_two_adapters_hold_what_the_other_waits_for(stores, parts):
    """Each machine has room for one, and gives it to another one first."""
    first, second = (stores.request_load(LoadRequest(n, "a", f"/adapters/{n}")) for n in (1, 2))
    parts[0].inbox.append(loaded(parts[0], 1, 31))
    parts[1].inbox.append(loaded(parts[1], 2, 72))
    assert stores.poll() == []
    assert leases(parts) == [1, 0]
    parts[1].inbox.append(loaded(parts[1], 1, 71))
    (answer,) = stores.poll()
    assert answer.ticket == first
    stores.release(answer.pack.pack)
    parts[0].inbox.append(loaded(parts[0], 2, 32))
    assert stores.poll() == []
    parts[1].inbox.append(loaded(parts[1], 3, 72))
    (answer,) = stores.poll()
    assert answer.ticket == second


def test_one_machines_failure_is_the_adapters_and_leaves_no_lease(stores, parts):
    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1"))
    parts[0].inbox.append(loaded(parts[0], 1, 30))
    parts[1].inbox.append(Failed(1, FailureKind.GONE, "no such folder", []))
    assert stores.poll() == [Failed(ticket, FailureKind.GONE, "no such folder", [])]
    assert leases(parts) == [0, 0]

    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1"))
    parts[0].inbox.append(Failed(2, FailureKind.GONE, "no such folder", []))
    assert [type(message) for message in stores.poll()] == [Failed]
    assert not parts[1].load_requests, "the other machine need not go on"


def test_machines_with_different_files_refuse_the_adapter(stores, parts):
    stores.request_load(LoadRequest(1, "a", "/adapters/1"))
    parts[0].inbox.append(loaded(parts[0], 1, 30, "digest 1"))
    parts[1].inbox.append(loaded(parts[1], 1, 70, "digest 2"))
    (answer,) = stores.poll()
    assert isinstance(answer, Failed)
    assert "not the same on all machines" in answer.message
    assert "/adapters/1" in answer.message
    assert leases(parts) == [0, 0]


def test_a_load_request_can_be_taken_back_at_any_time(stores, parts):
    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1"))
    parts[0].inbox.append(loaded(parts[0], 1, 30))
    assert stores.poll() == []
    stores.cancel(ticket)
    assert leases(parts) == [0, 0]
    assert not parts[1].load_requests
    stores.cancel(ticket)  # again: nothing
    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1"))
    parts[1].inbox.append(loaded(parts[1], 2, 70))
    assert stores.poll() == []
    stores.cancel(ticket)  # between two wants of the second machine
    assert leases(parts) == [0, 0]
    assert not parts[0].load_requests


def test_a_check_that_keeps_nothing_somewhere_keeps_nothing(stores, parts):
    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1", keep=False))
    parts[0].inbox.append(loaded(parts[0], 1, 30, keep=False))
    parts[1].inbox.append(loaded(parts[1], 1, 0, keep=False))
    (answer,) = stores.poll()
    assert (answer.ticket, answer.pack.pack, answer.leased) == (ticket, 0, False)


def test_a_check_whose_pack_one_machine_evicts_meanwhile_keeps_nothing(stores, parts):
    stores.request_load(LoadRequest(1, "a", "/adapters/1", keep=False))
    parts[1].inbox += [loaded(parts[1], 1, 70, keep=False), Evicted(70)]
    assert stores.poll() == []
    parts[0].inbox.append(loaded(parts[0], 1, 30, keep=False))
    (answer,) = stores.poll()
    assert answer.pack.pack == 0


def test_what_one_machine_evicts_is_lost(stores, parts):
    pack = load(stores, parts, (30, 70)).pack.pack
    stores.used([pack])
    assert [store.used_packs[-1] for store in parts] == [[30], [70]]
    stores.release(pack)
    parts[1].inbox.append(Evicted(70))
    assert stores.poll() == [Evicted(pack)]
    parts[0].inbox.append(Evicted(30))
    assert stores.poll() == []
    stores.used([pack])
    assert parts[0].used_packs[-1] == []


def test_forgotten_is_said_once_all_have(stores, parts):
    stores.forget(1)
    stores.forget(1)
    parts[0].inbox += [Forgotten(1), Forgotten(1)]
    assert stores.poll() == []
    parts[1].inbox.append(Forgotten(1))
    assert stores.poll() == [Forgotten(1)]
    parts[1].inbox.append(Forgotten(1))
    assert stores.poll() == [Forgotten(1)]


def test_an_adapter_is_forgotten_on_all_machines(stores, parts):
    stores.forget(1)
    assert [store.forgotten for store in parts] == [[1], [1]]


def test_a_pack_that_a_machine_has_lost_is_known_until_its_leases_are_given_back(stores, parts):
    pack = load(stores, parts, (30, 70)).pack.pack
    assert load(stores, parts, (30, 70)).pack.pack == pack
    parts[1].inbox.append(Restarted())
    assert stores.poll() == [Restarted()]
    for is_known in (True, False):
        stores.release(pack)
        assert bool(stores.elsewhere(pack)) is is_known
    assert leases(parts) == [0, 0]
    stores.release(pack)  # it is nobody's any more


def test_totals_add_up(stores, parts):
    parts[0].inbox.append(Totals(100, 2, 1000, 4))
    assert stores.poll() == [Totals(100, 2, 1000, 4)]
    parts[1].inbox.append(Totals(150, 3, 1000, 3))
    assert stores.poll() == [Totals(250, 3, 2000, 3)]
    parts[1].inbox.append(Totals(150, 3, None, None))
    assert stores.poll() == [Totals(250, 3, None, 4)]
    parts[0].inbox.append(Restarted())
    parts[1].inbox.append(Totals(150, 3, None, None))
    assert stores.poll() == [Restarted(), Totals(150, 3, None, None)]


def test_after_a_restart_everything_is_loaded_again_and_leases_end_when_given_back(stores, parts):
    held = load(stores, parts, (30, 70)).pack.pack
    waiting = stores.request_load(LoadRequest(2, "b", "/adapters/2"))
    parts[0].inbox.append(loaded(parts[0], 2, 31))
    assert stores.poll() == []

    parts[0].restart()
    assert stores.poll() == [Restarted()]
    # The other machine's workers may be copying: its lease stays until it is given back.
    assert parts[1].leases[70] == 1
    stores.release(held)
    assert parts[1].leases[70] == 0
    # What the new store had loaded for a load request is asked of it again.
    assert parts[0].load_requests[3].path == "/adapters/2"
    parts[0].inbox.append(loaded(parts[0], 3, 1031))
    parts[1].inbox.append(loaded(parts[1], 2, 71))
    (answer,) = stores.poll()
    assert answer.ticket == waiting
    again = load(stores, parts, (1030, 70)).pack.pack
    assert again != held


def test_a_restart_in_the_middle_begins_with_the_new_store(parts):
    parts.append(FakeStore())
    stores = MachineStores(parts)
    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1"))
    for machine, pack in enumerate((30, 70)):
        parts[machine].inbox.append(loaded(parts[machine], 1, pack))
    assert stores.poll() == []
    assert leases(parts) == [1, 1, 0]
    parts[0].restart()
    assert stores.poll() == [Restarted()]
    assert leases(parts) == [0, 0, 0], "the second machine's lease comes after the first one's"
    for machine, pack in enumerate((1030, 70, 90)):
        part = parts[machine]
        part.inbox.append(loaded(part, part.only().ticket, pack))
        answers = stores.poll()
    assert [answer.ticket for answer in answers] == [ticket]
    assert leases(parts) == [1, 1, 1]


def test_a_pack_of_the_stores_is_reported_as_it_is_on_the_first_machine(stores, parts):
    answer = load(stores, parts, (30, 70))
    assert msgspec.structs.replace(answer.pack, pack=30) == pack_info(30, "same")


def test_all_machines_hear_whose_turn_a_load_may_take(stores, parts):
    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1", owners=("acme",), most=3))
    for owner in ("other", "other"):
        stores.share(ticket, owner)
    assert [(s.load_requests[1].owners, s.load_requests[1].most) for s in parts] == [
        (("acme", "other"), 3)
    ] * 2
    parts[0].inbox.append(loaded(parts[0], 1, 30))
    assert stores.poll() == []
    stores.share(ticket, "late")  # one of them has its answer
    assert parts[1].load_requests[1].owners == ("acme", "other", "late")
    stores.share(99, "nobody")


def test_all_machines_together_are_waited_for_no_longer_than_one(stores, parts):
    stores.request_load(LoadRequest(1, "a", "/adapters/1"))
    assert stores.poll(0.05) == []
    assert [store.waited for store in parts] == [1, 0]


def test_a_machine_that_has_answered_is_not_waited_for(stores, parts):
    ticket = stores.request_load(LoadRequest(1, "a", "/adapters/1"))
    parts[0].inbox.append(loaded(parts[0], 1, 30))
    assert stores.poll() == []
    parts[1].answers = lambda: parts[1].inbox.append(loaded(parts[1], 1, 70))
    assert [answer.ticket for answer in stores.poll(60.0)] == [ticket]
    assert [store.waited for store in parts] == [0, 1]
