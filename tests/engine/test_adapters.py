"""What an engine core knows of its adapters, and asks of the store and the workers."""

import time

import pytest
from vllm.lora.request import LoRARequest

from tests.engine.fake_engine import Engine, lora, pack_info
from tests.metrics.readings import recorder, shown
from vllm_multilora.adapters.directory import FIRST_NUMBER
from vllm_multilora.adapters.problems import Code, Problem
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.engine.adapters import known_adapters
from vllm_multilora.integration.engine.adapters.adapter_machine import MAX_TIMES_GONE
from vllm_multilora.integration.engine.adapters.known_adapters import KnownAdapters
from vllm_multilora.integration.failed_requests import AdapterRefusedError
from vllm_multilora.integration.seals import Seal
from vllm_multilora.integration.worker_link.fill_link import Filled, FillFailed
from vllm_multilora.integration.worker_link.orders import Check, Fill
from vllm_multilora.slots.pins import PinLimitError
from vllm_multilora.states import AdapterState
from vllm_multilora.store.protocol.messages import (
    Failed,
    Forgotten,
    Loaded,
    Reading,
    Restarted,
    Totals,
)

# From the request to the slot


def test_a_request_takes_its_adapter_from_the_disk_to_a_slot(engine):
    adapters = engine.adapters
    assert adapters.state(1) is AdapterState.ABSENT
    adapters.request_load(lora(1))
    assert adapters.state(1) is AdapterState.QUEUED
    assert not adapters.is_ready(1)
    engine.store.reading()
    engine.poll()
    assert adapters.state(1) is AdapterState.READING
    engine.loaded(pack_info(7))
    assert adapters.state(1) is AdapterState.HOST
    assert adapters.is_ready(1)
    assert not adapters.bring(1)
    engine.poll()
    order = engine.workers.only()
    assert isinstance(order, Fill)
    assert (order.slot, order.pack.pack) == (0, 7)
    engine.filled(ranks=[0])
    assert adapters.state(1) is AdapterState.HOST
    assert engine.store.leased == {7: 1}
    engine.filled(ranks=[1])
    assert adapters.state(1) is AdapterState.SLOT
    assert adapters.bring(1)
    assert engine.store.leased == {}


def test_what_waits_for_slots_is_given_back_without_a_look_at_all_adapters(engine, monkeypatch):
    """In a pause that is done for each message that comes."""
    for number in (1, 2, 3):
        engine.host(number)
    engine.adapters.drop(3)
    monkeypatch.setattr(KnownAdapters, "__iter__", None)
    engine.adapters.yield_host_memory()
    assert not engine.store.leased


def test_the_store_learns_what_steps_use_when_that_has_changed(engine):
    """All of it: the store tells itself who has joined, after a pause as well."""
    engine.fill(1, 10)
    engine.step(1)
    engine.fill(2, 20)
    engine.step(1, 2)
    engine.step()
    engine.step(1)
    assert engine.store.used_packs == [[10], [20], [10, 20], [], [10]]


def test_a_copy_that_fails_on_one_rank_fails_the_adapter_and_no_other(engine):
    engine.fill(1)
    engine.host(2)
    engine.bring(2)
    order = engine.workers.only()
    engine.refused(ranks=[1])
    assert engine.adapters.state(2) is AdapterState.FAILED
    assert engine.adapters.failure(2).message == "it does not fit"
    assert not engine.adapters.is_ready(2)
    assert engine.adapters.state(1) is AdapterState.SLOT
    engine.filled(order, ranks=[0])
    assert engine.adapters.slots.contents == (1, None)


# Copies that are waited for


def test_a_copy_that_ends_while_it_is_waited_for_counts_in_the_same_step(engines):
    engine = engines(copy_s=60.0)
    for number in (1, 2):
        engine.host(number)
    engine.workers.answers = engine.workers.filled
    assert engine.adapters.bring(1)
    assert engine.store.leased == {2: 1}
    assert engine.adapters.state(1) is AdapterState.SLOT
    engine.step()
    engine.workers.answers = engine.workers.refused
    assert not engine.adapters.bring(2)
    assert engine.adapters.failure(2).message == "it does not fit"


@pytest.mark.parametrize(("mib", "waited"), [(3, 1), (5, 0)])
def test_a_copy_is_waited_for_once_unless_it_is_large(engines, mib, waited):
    engine = engines(copy_s=0.001)
    engine.host(1, nbytes=mib * 2**20)
    for _ in range(2):
        assert not engine.adapters.bring(1)
        engine.step()
        assert engine.workers.waited == waited
    engine.filled()
    assert engine.adapters.bring(1)


def test_a_step_waits_so_long_for_all_of_its_copies_together(engines):
    engine = engines(slots=3, copy_s=0.001)
    for number in (1, 2, 3):
        engine.host(number)
    for number in (1, 2):
        assert not engine.adapters.bring(number)
    assert engine.workers.waited == 1
    engine.step()
    assert [order.slot for order in engine.workers.orders] == [0, 1]
    assert not engine.adapters.bring(3)
    assert engine.workers.waited == 2


def test_a_version_that_comes_while_the_one_before_is_copied_is_not_taken_for_it(engines):
    engine = engines(copy_s=60.0)
    engine.host(1, 7)
    engine.adapters.register(lora(1, inplace=True))

    def reload():
        engine.workers.filled()
        engine.store.loaded(pack_info(8))

    engine.workers.answers = reload
    assert not engine.adapters.bring(1)
    assert not engine.adapters.is_ready(1)
    engine.loaded(pack_info(8))
    engine.workers.answers = engine.workers.filled
    assert engine.adapters.is_ready(1)
    assert engine.adapters.bring(1)
    assert engine.adapters.version(1).pack == 8


# Failures


def test_a_lease_on_what_is_in_memory_is_waited_for_once(engine):
    engine.host(1, 7)
    engine.adapters.drop(1)
    engine.adapters.request_load(lora(1))
    engine.adapters.poll()  # others look before the step does
    assert engine.store.waited == 0
    engine.adapters.poll(0.01)
    assert engine.store.waited == 1
    engine.adapters.poll(0.01)
    assert engine.store.waited == 1
    assert not engine.adapters.is_ready(1)
    engine.loaded(pack_info(7))
    assert engine.adapters.is_ready(1)


def test_a_lease_that_comes_while_it_is_waited_for_counts_at_once(engine):
    engine.host(1, 7)
    engine.adapters.drop(1)
    engine.adapters.request_load(lora(1))
    engine.store.answers = lambda: engine.store.loaded(pack_info(7))
    engine.adapters.poll(60.0)
    assert engine.adapters.is_ready(1)


@pytest.mark.parametrize("number", [1, 2])
def test_nobody_waits_for_files_to_be_read(engine, number):
    engine.host(1, 7)
    engine.adapters.drop(1)
    engine.adapters.request_load(lora(number, inplace=True))
    engine.adapters.poll(60.0)
    assert engine.store.waited == 0


def test_a_new_request_is_a_new_try(engine):
    engine.adapters.request_load(lora(1))
    engine.failed(kind=FailureKind.GONE)
    assert engine.adapters.state(1) is AdapterState.FAILED
    assert engine.adapters.failure(1).kind is FailureKind.GONE
    assert not engine.adapters.is_ready(1)
    assert not engine.store.load_requests
    engine.adapters.request_load(lora(1))
    assert engine.adapters.state(1) is AdapterState.QUEUED
    engine.loaded(pack_info(7))
    assert engine.adapters.is_ready(1)


# Requests that end early


def test_what_the_store_says_of_a_load_request_that_was_taken_back_is_no_matter(engine):
    """It may come in one go with what has taken the load request back."""
    engine.adapters.request_load(lora(1))
    load_request = engine.store.only()
    engine.adapters.drop(1)
    failed = Failed(load_request.ticket, FailureKind.INVALID, "it is bad", [])
    checked = Loaded(load_request.ticket, pack_info(1), 0.1, was_read=True, leased=False)
    engine.store.inbox = [Reading(load_request.ticket), failed, checked, Forgotten(1)]
    engine.poll()
    assert engine.adapters.state(1) is AdapterState.ABSENT


# Losses


def test_a_store_that_is_started_again_is_asked_again_for_what_waits(engine):
    engine.fill(1)
    engine.host(2)
    engine.adapters.request_load(lora(3))
    load_request = engine.store.only()
    engine.restart_store()
    assert engine.adapters.state(1) is AdapterState.SLOT
    assert not engine.adapters.is_ready(2)
    assert engine.store.load_requests.keys() > {load_request.ticket}
    again = next(one for one in engine.store.load_requests.values() if one.adapter == 2)
    engine.store.loaded(pack_info(20), again)
    engine.loaded(pack_info(30), load_request)
    assert engine.adapters.is_ready(2)
    assert engine.adapters.is_ready(3)


def test_nobody_waits_for_a_store_that_has_gone_to_forget(engine):
    engine.fill(1)
    engine.step()
    gone = engine.adapters.remove(1)
    for _ in range(2):
        engine.restart_store()
    assert gone.result(0) is True


@pytest.mark.parametrize("is_sent", [True, False], ids=["order sent", "order not sent yet"])
def test_slots_lost_while_one_is_filled(engine, is_sent):
    engine.host(1)
    engine.adapters.bring(1)
    if is_sent:
        engine.poll()
    engine.adapters.slots_lost()
    engine.poll()
    engine.filled()
    assert engine.adapters.state(1) is AdapterState.HOST
    assert not engine.store.leased
    assert not engine.adapters.is_ready(1)
    engine.loaded(pack_info(1))
    assert engine.adapters.is_ready(1)


def test_answers_to_orders_that_nobody_knows_are_no_matter(engine):
    for order in (99, -99):
        engine.workers.say_anything(Filled(order, 0.1))
    engine.poll()
    assert not engine.adapters.known()


# New versions


def test_a_reload_of_the_same_weights_copies_nothing(engine):
    engine.fill(1, 10, digest="same")
    engine.adapters.request_load(lora(1, inplace=True))
    assert engine.store.only().fresh
    engine.loaded(pack_info(11, "same"))
    assert engine.adapters.state(1) is AdapterState.SLOT
    assert engine.adapters.bring(1)
    assert not engine.store.leased


def test_a_reload_of_other_weights_waits_for_the_running_requests(engine):
    engine.fill(1, 10)
    engine.adapters.request_load(lora(1, inplace=True))
    engine.loaded(pack_info(11))
    assert engine.adapters.is_ready(1)
    assert not engine.adapters.bring(1)
    engine.step(1)
    assert not engine.workers.orders
    engine.idle()
    assert not engine.bring(1)
    order = engine.workers.only()
    assert (order.slot, order.pack.pack) == (0, 11)
    engine.filled()
    assert engine.adapters.bring(1)
    assert not engine.store.leased


@pytest.mark.parametrize("by", ["request", "registration"])
def test_a_stale_version_makes_room_for_the_new_one(engine, by):
    """Where host memory holds one adapter, the new version would wait for it for ever."""
    engine.host(1, 10)
    if by == "request":
        engine.adapters.request_load(lora(1, inplace=True))
    else:
        engine.adapters.register(lora(1, inplace=True))
        engine.loaded(pack_info(0, "newer"))
        assert not engine.adapters.is_ready(1)
    assert engine.store.only().fresh
    assert not engine.store.leased


@pytest.mark.parametrize("place", ["slot", "host"])
def test_a_reload_of_broken_files_leaves_the_version_before_serving(engine, place):
    if place == "slot":
        engine.fill(1, 10)
    else:
        engine.host(1, 10)
    engine.adapters.request_load(lora(1, inplace=True))
    engine.failed()
    assert engine.adapters.failure(1, reload=True).message == "it is bad"
    assert not engine.adapters.is_ready(1, reload=True)
    assert engine.adapters.failure(1) is None
    if place == "host":
        assert not engine.adapters.is_ready(1)
        assert not engine.store.only().fresh
        engine.loaded(pack_info(10), was_read=False)
    assert engine.adapters.is_ready(1)
    assert engine.adapters.bring(1) is (place == "slot")


def test_a_reload_is_not_answered_by_the_load_that_was_under_way(engine):
    """The load under way may find the old version in host memory and not look at the files."""
    engine.adapters.request_load(lora(1))
    assert not engine.store.only().fresh
    engine.adapters.request_load(lora(1, inplace=True))
    engine.adapters.request_load(lora(1, inplace=True))
    assert engine.store.only().fresh
    assert engine.store.tickets == 2
    engine.loaded(pack_info(11))
    assert engine.adapters.is_ready(1, reload=True)


def test_a_reload_is_not_answered_by_a_check_that_was_under_way(engine):
    """The check under way may have looked at the files before the reload."""
    engine.fill(1, 10, digest="same")
    future = engine.adapters.register(lora(1, inplace=True))
    check = engine.store.only()
    engine.adapters.request_load(lora(1, inplace=True))
    engine.loaded(pack_info(0, "same"), check)
    assert not engine.adapters.is_ready(1, reload=True)
    engine.loaded(pack_info(11))
    assert future.result(0) is True
    assert engine.adapters.is_ready(1, reload=True)


def test_a_version_that_was_registered_and_cannot_be_had_does_not_leave_the_one_before_serving(
    engine,
):
    """The operator was told that the new one serves."""
    engine.fill(1, 10)
    future = engine.adapters.register(lora(1, inplace=True))
    engine.loaded(pack_info(0, "newer"))
    assert future.result(0) is True
    engine.adapters.request_load(lora(1))
    engine.failed()
    assert engine.adapters.failure(1).message == "it is bad"
    engine.adapters.request_load(lora(1))
    assert engine.store.only().fresh


def test_a_version_that_comes_back_before_a_newer_one_could_be_had_serves_on(engine):
    engine.fill(1, 10, digest="first")
    engine.adapters.register(lora(1, inplace=True))
    engine.loaded(pack_info(0, "newer"))
    engine.adapters.request_load(lora(1))
    engine.loaded(pack_info(11, "first"))
    assert engine.adapters.is_ready(1)
    assert engine.adapters.bring(1)
    assert not engine.store.load_requests
    assert not engine.store.leased


# Two adapters under one number


def test_a_number_whose_adapter_nobody_uses_may_become_another_adapters(engine):
    engine.fill(1, 10)
    engine.step()
    engine.adapters.drop(1)
    assert engine.adapters.request_load(lora(1, path="/adapters/other")) is None
    assert engine.store.forgotten == [1]
    assert engine.store.only().path == "/adapters/other"
    engine.loaded(pack_info(11))
    assert engine.adapters.is_ready(1)
    assert not engine.adapters.bring(1)


def test_a_number_that_requests_use_stays_their_adapters(engine):
    engine.fill(1, 10)
    failure = engine.adapters.request_load(lora(1, path="/adapters/other"))
    assert failure.kind is FailureKind.INVALID
    assert "/adapters/1" not in failure.message
    assert_refused(engine.adapters.register(lora(1, path="/adapters/other")))
    assert engine.adapters.state(1) is AdapterState.SLOT
    assert not engine.store.load_requests


# Registrations


def assert_refused(future) -> AdapterRefusedError:
    error = future.exception(0)
    assert isinstance(error, AdapterRefusedError)
    return error


@pytest.mark.parametrize(("pack", "state"), [(7, AdapterState.HOST), (0, AdapterState.ABSENT)])
def test_an_adapter_is_registered_when_it_was_checked_with_or_without_room(engine, pack, state):
    future = engine.adapters.register(lora(1))
    load_request = engine.store.only()
    assert (load_request.keep, load_request.fresh) == (False, False)
    assert not future.done()
    engine.loaded(pack_info(pack, "digest", special=not pack))
    assert future.result(0) is True
    assert engine.adapters.state(1) is state
    engine.adapters.request_load(lora(1))
    assert engine.store.only().keep


def test_an_adapter_that_a_request_has_registered_is_kept_until_the_request_comes(engine):
    """Read once, where everybody else's adapters fill host memory."""
    number = FIRST_NUMBER + 1
    future = engine.adapters.register(lora(number))
    load_request = engine.store.only()
    assert (load_request.keep, load_request.fresh) == (True, False)
    engine.loaded(pack_info(7))
    assert future.result(0) is True
    assert not engine.store.leased  # it may leave again
    engine.adapters.request_load(lora(number))
    assert engine.adapters.state(number) is AdapterState.HOST


def test_a_new_version_of_a_directorys_adapter_takes_nobodys_room(engine):
    """Nobody waits for it. Where all memory is on lease, it would hold up those after it."""
    old, new = (lora(FIRST_NUMBER + number, path="/adapters/acme") for number in (1, 2))
    engine.adapters.register(old)
    engine.loaded(pack_info(7))
    future = engine.adapters.register(new)
    load_request = engine.store.only()
    assert not load_request.keep
    engine.loaded(pack_info(0, "another"), load_request)
    assert future.result(0) is True
    engine.adapters.remove(old.lora_int_id)
    engine.adapters.remove(new.lora_int_id)
    engine.adapters.register(new)  # as the first request after an unload does
    assert engine.store.only().keep


def test_a_directorys_adapter_is_looked_at_again_when_its_folder_is_put_back(engine):
    """Under its number, what has been in its place may have been read meanwhile."""
    number = FIRST_NUMBER + 1
    engine.fill(number, 10)
    future = engine.adapters.register(lora(number))
    assert engine.store.only().fresh
    engine.loaded(pack_info(11))
    assert future.result(0) is True
    assert engine.adapters.version(number).digest == "digest 11"


def test_registering_anew_while_the_files_are_checked_looks_at_them_again(engine):
    """All that come meanwhile get the next check, and none waits for more than two."""
    first = engine.adapters.register(lora(1))
    second, third = (engine.adapters.register(lora(1, inplace=True)) for _ in range(2))
    engine.loaded(pack_info(11))
    assert first.result(0) is True
    assert not second.done()
    assert engine.store.only().fresh
    last = engine.adapters.register(lora(1, inplace=True))
    engine.loaded(pack_info(12))
    assert (second.result(0), third.result(0)) == (True, True)
    assert not last.done()
    engine.loaded(pack_info(13))
    assert last.result(0) is True
    assert not engine.store.load_requests


@pytest.mark.parametrize("is_known", [True, False])
def test_registering_anew_while_bad_files_are_checked_looks_at_them_again(engine, is_known):
    if is_known:
        engine.fill(1, 10)
    first, second = (engine.adapters.register(lora(1, inplace=True)) for _ in range(2))
    engine.failed()
    assert_refused(first)
    assert not second.done()
    engine.loaded(pack_info(11))
    assert second.result(0) is True


def test_all_registrations_of_what_is_removed_are_refused(engine):
    first, second = (engine.adapters.register(lora(1, inplace=True)) for _ in range(2))
    engine.adapters.remove(1)
    for future in (first, second):
        assert assert_refused(future).failure.kind is FailureKind.GONE
    assert not engine.store.load_requests


def test_a_refused_registration_says_all_problems_and_leaves_nothing(engine):
    future = engine.adapters.register(lora(1))
    problems = [{"message": "rank 400", "hint": "raise --max-lora-rank"}]
    engine.failed(problems=problems)
    error = assert_refused(future)
    assert error.problems == problems
    assert engine.adapters.state(1) is AdapterState.ABSENT
    assert engine.store.forgotten == [1]


def test_a_reload_that_fails_leaves_the_version_before_serving(engine):
    engine.fill(1, 10)
    future = engine.adapters.register(lora(1, inplace=True))
    engine.failed()
    assert_refused(future)
    assert engine.adapters.state(1) is AdapterState.SLOT
    engine.adapters.request_load(lora(1))
    assert engine.adapters.bring(1)


def test_workers_check_what_vllm_fills_in(engine):
    future = engine.adapters.register(lora(1))
    engine.loaded(pack_info(7, special=True))
    again = engine.store.only()
    assert (again.keep, again.fresh) == (True, False)
    engine.loaded(pack_info(7, special=True), was_read=False)
    assert isinstance(engine.workers.only(), Check)
    assert engine.adapters.state(1) is AdapterState.READING
    engine.filled(ranks=[0])
    assert not future.done()
    engine.filled(ranks=[1])
    assert future.result(0) is True
    assert engine.adapters.state(1) is AdapterState.HOST
    assert not engine.store.leased


def begin_check(engine: Engine, number: int, pack: int, *, inplace: bool = False):
    future = engine.adapters.register(lora(number, inplace=inplace))
    engine.loaded(pack_info(pack, special=True))
    engine.loaded(pack_info(pack, special=True))
    return future


@pytest.mark.parametrize("is_known", [False, True])
def test_what_workers_refuse_is_not_registered(engine, is_known):
    """Nor does it take the place of the version before."""
    if is_known:
        engine.fill(1, 10)
    future = begin_check(engine, 1, 11, inplace=is_known)
    engine.refused(ranks=[0])
    assert assert_refused(future).failure.message == "it does not fit"
    assert engine.adapters.state(1) is (AdapterState.SLOT if is_known else AdapterState.ABSENT)
    engine.refused(ranks=[1])
    assert not engine.store.leased


def test_weights_that_are_in_a_slot_need_no_check(engine):
    engine.fill(1, 10, digest="same", special=True)
    future = engine.adapters.register(lora(1, inplace=True))
    engine.loaded(pack_info(11, "same", special=True))
    assert future.result(0) is True


def test_a_check_whose_store_has_gone_is_made_again(engine):
    future = begin_check(engine, 1, 7)
    order = engine.workers.only()
    engine.restart_store()
    engine.refused(order)
    assert not future.done()
    engine.loaded(pack_info(0, special=True))
    assert future.result(0) is True


def test_a_copy_of_a_pack_that_has_gone_fails_nobody(engine):
    engine.host(1, 10)
    engine.bring(1)
    order = engine.workers.only()
    engine.workers.say(FillFailed(order.order, FailureKind.INTERNAL, "it is gone", is_gone=True))
    engine.poll()
    assert engine.adapters.failure(1) is None
    assert engine.adapters.state(1) is AdapterState.ABSENT
    assert not engine.store.leased
    assert not engine.adapters.is_ready(1)
    assert engine.store.only().keep


def say_gone(engine):
    """As a worker that does not reach the store, which has the adapter."""
    order = engine.workers.only()
    reported = FillFailed(order.order, FailureKind.UNREADABLE, "no socket", is_gone=True)
    engine.workers.say(reported)
    engine.poll()


def test_requests_do_not_wait_for_ever_for_a_worker_that_cannot_have_an_adapter(engine):
    engine.host(1, 10)
    for _ in range(MAX_TIMES_GONE):
        engine.bring(1)
        say_gone(engine)
        assert not engine.adapters.is_ready(1)
        engine.loaded(pack_info(10))
    engine.bring(1)
    say_gone(engine)
    failure = engine.adapters.failure(1)
    assert failure is not None
    assert failure.kind is FailureKind.UNREADABLE
    assert "socket" not in failure.message


def test_an_adapter_is_loaded_again_as_often_as_stores_die(engine):
    engine.host(1, 10)
    for _ in range(2 * MAX_TIMES_GONE):
        engine.bring(1)
        engine.store.restart()
        say_gone(engine)
        assert not engine.adapters.is_ready(1)
        engine.loaded(pack_info(10))
    assert engine.adapters.failure(1) is None


def test_a_registration_does_not_wait_for_ever_for_a_worker_that_cannot_have_its_adapter(engine):
    future = begin_check(engine, 1, 7)
    for _ in range(MAX_TIMES_GONE):
        say_gone(engine)
        assert not future.done()
        for _ in ("without a lease", "with one"):
            engine.loaded(pack_info(7, special=True))
    say_gone(engine)
    assert_refused(future)


def test_a_registration_gets_the_answer_of_its_own_check(engine):
    """A request's load of what was there before the files changed may fail beside it."""
    engine.adapters.request_load(lora(1))
    first_request = engine.store.only()
    future = engine.adapters.register(lora(1, inplace=True))
    check_request = engine.store.load_requests[2]
    engine.failed(first_request)
    assert engine.adapters.state(1) is AdapterState.FAILED
    assert not future.done()
    engine.loaded(pack_info(7), check_request)
    assert future.result(0) is True
    assert engine.adapters.state(1) is AdapterState.HOST


def test_a_version_that_workers_have_checked_while_it_waits_for_a_slot_is_on_lease_once(engine):
    engine.host(1, 10, special=True)
    future = engine.adapters.register(lora(1, inplace=True))
    for _ in range(2):  # the second time to stay, for the workers
        engine.loaded(pack_info(10, special=True))
    engine.filled()
    assert future.result(0)
    assert engine.store.leased == {10: 1}


def test_what_an_aborted_request_has_brought_beside_a_check_that_fails_is_given_back(engine):
    future = engine.adapters.register(lora(1))
    engine.adapters.request_load(lora(1))
    engine.adapters.drop(1)
    check, requested = engine.store.load_requests.values()
    engine.loaded(pack_info(10), requested)
    engine.store.failed(check)
    engine.poll()
    assert_refused(future)
    assert not engine.store.leased


def test_a_registration_that_fails_leaves_the_reload_that_requests_wait_for(engine):
    engine.fill(1, 10)
    engine.adapters.request_load(lora(1, inplace=True))
    future = engine.adapters.register(lora(1, inplace=True))
    (check,) = [
        load_request
        for load_request in engine.store.load_requests.values()
        if not load_request.keep
    ]
    engine.failed(check)
    assert_refused(future)
    assert engine.adapters.failure(1, reload=True) is None
    assert engine.adapters.state(1) is AdapterState.QUEUED
    engine.loaded(pack_info(11, "newer"))
    assert engine.adapters.state(1) is AdapterState.HOST


def test_a_reload_that_fails_where_a_newer_version_was_checked_fails_all(engine):
    """The version before must not serve on."""
    engine.fill(1, 10)
    registered = engine.adapters.register(lora(1, inplace=True))
    engine.store.loaded(pack_info(0, "newer"))  # there was no room for it
    engine.poll()
    assert registered.result(0)
    engine.adapters.request_load(lora(1, inplace=True))
    engine.failed()
    assert engine.adapters.failure(1) is not None


def test_a_registration_ends_the_wait_for_a_reload_that_nobody_waits_for_any_more(engine):
    engine.fill(1, 10, digest="same")
    engine.adapters.request_load(lora(1, inplace=True))
    engine.adapters.drop(1)
    future = engine.adapters.register(lora(1))
    engine.loaded(pack_info(11, "same"))
    assert future.result(0)
    assert engine.adapters.state(1) is AdapterState.SLOT


# Pins


def test_a_pinned_adapter_gets_a_slot_at_once_and_keeps_it(engine):
    engine.adapters.register(lora(1))
    engine.loaded(pack_info(7))
    future = engine.adapters.pin(1)
    assert engine.store.only().keep
    engine.loaded(pack_info(7), was_read=False)
    assert future.result(0) is True
    engine.filled()
    assert engine.adapters.state(1) is AdapterState.SLOT
    for number in (2, 3):
        engine.fill(number)
        engine.idle()
    assert engine.adapters.slots.contents == (1, 3)


def test_no_more_than_all_slots_but_one_are_pinned(engine):
    for number in (1, 2):
        engine.fill(number)
    assert engine.adapters.pin(1).result(0) is True
    with pytest.raises(PinLimitError):
        engine.adapters.pin(2)
    with pytest.raises(ValueError, match="never added"):
        engine.adapters.pin(9)


def test_an_adapter_that_cannot_be_had_is_not_pinned(engine, monkeypatch):
    shown_as_pinned: list[frozenset[int]] = []
    monkeypatch.setattr(engine.adapters.observer, "pinned", shown_as_pinned.append)
    engine.adapters.register(lora(1))
    engine.loaded(pack_info(0, "digest"))
    future = engine.adapters.pin(1)
    engine.failed(kind=FailureKind.UNREADABLE)
    assert_refused(future)
    assert 1 not in engine.adapters.slots.pins
    assert shown_as_pinned == [{1}, set()]


def test_a_second_pin_that_fails_leaves_the_first(engine):
    engine.fill(1)
    assert engine.adapters.pin(1).result(0) is True
    engine.adapters.drop(1)
    engine.adapters.slots_lost()
    engine.evict(1)
    future = engine.adapters.pin(1)
    engine.failed(kind=FailureKind.UNREADABLE)
    assert_refused(future)
    assert 1 in engine.adapters.slots.pins


def test_a_pinned_name_stays_with_the_version_that_serves_when_another_is_refused(
    engines, tmp_path
):
    engine = engines(ranks=1, pinned=["adapter 1"], recorder=recorder(tmp_path, "engine"))
    engine.fill(1)
    info = "vllm:lora_adapter_info{engine=0,lora_name=adapter 1,pinned=true,rank=8,tier=gpu}"
    assert shown(tmp_path)[info] == 1
    future = engine.adapters.register(LoRARequest("adapter 1", 9, "/adapters/new"))
    assert engine.adapters.slots.pins.adapters == {9}
    engine.failed()
    assert_refused(future)
    for number in (2, 3):
        engine.fill(number)
        engine.idle()
    assert engine.adapters.slots.contents == (1, 3)
    assert shown(tmp_path)[info] == 1


# Removal


@pytest.mark.parametrize("read_for", ["a request", "a registration", "nobody here"])
def test_what_was_read_because_a_request_waited_was_not_in_host_memory(engine, read_for):
    if read_for == "a registration":
        engine.adapters.register(lora(1))
        engine.loaded(pack_info(1))
    engine.adapters.request_load(lora(1))
    engine.loaded(pack_info(1), was_read=read_for == "a request")
    engine.adapters.bring(1)
    engine.step(1)
    assert engine.adapters.observer.usage.of(1).cpu_hits == (read_for != "a request")


def test_registrations_that_come_together_are_one_check(engine):
    futures = [engine.adapters.register(lora(1)) for _ in range(2)]
    assert engine.store.tickets == 1
    engine.loaded(pack_info(1))
    assert all(future.result() for future in futures)


def test_a_registration_that_comes_while_workers_check_gets_their_answer(engine):
    futures = [engine.adapters.register(lora(1))]
    for _ in range(2):  # once more with a lease, for the workers
        engine.loaded(pack_info(1, special=True))
    futures.append(engine.adapters.register(lora(1)))
    assert engine.store.tickets == 2
    engine.filled()
    assert all(future.result() for future in futures)


@pytest.mark.parametrize("what", ["requests", "a failure", "a check", "a pin", "memory", "a slot"])
def test_an_adapter_that_is_of_use_to_somebody_is_not_forgotten(engine, monkeypatch, what):
    monkeypatch.setattr(known_adapters, "MAX_KNOWN", 1)
    if what in ("requests", "a failure"):
        engine.adapters.request_load(lora(1))
    elif what == "a check":
        engine.adapters.register(lora(1))
    elif what == "a slot":
        engine.fill(1)
        engine.adapters.drop(1)
        engine.idle()
    else:
        engine.host(1)
        engine.adapters.drop(1)
    if what == "a failure":  # its requests have not been ended yet
        engine.store.failed()
    if what in ("a pin", "a slot"):
        engine.store.evict(1)
    engine.poll()
    if what == "a pin":
        engine.adapters.pin(1)
    engine.adapters.request_load(lora(2))
    assert {entry.number for entry in engine.adapters.known()} == {1, 2}


def test_a_registration_of_an_adapter_that_has_failed_is_a_new_try(engine):
    engine.adapters.request_load(lora(1))
    engine.failed()
    assert engine.adapters.state(1) is AdapterState.FAILED
    engine.adapters.register(lora(1))
    assert engine.adapters.state(1) is AdapterState.QUEUED


def test_an_adapter_is_called_what_its_newest_request_calls_it(engine):
    engine.adapters.request_load(lora(1))
    engine.adapters.drop(1)
    engine.adapters.request_load(LoRARequest("another name", 1, "/adapters/1"))
    assert engine.store.only().name == "another name"


def test_what_the_store_holds_is_known_as_it_has_said_last(engine):
    for count in (1, 2):
        engine.store.inbox.append(Totals(64 * count, count, None, None))
    engine.poll()
    assert engine.adapters.observer.host_memory == Totals(128, 2, None, None)


def test_a_new_store_has_nothing_and_is_given_back_what_its_peers_on_other_machines_hold(engine):
    engine.host(1)
    assert engine.adapters.state(1) is AdapterState.HOST
    engine.store.inbox.append(Restarted())
    engine.poll()
    assert not engine.store.leased
    assert engine.adapters.state(1) is AdapterState.ABSENT
    assert not engine.adapters.is_ready(1)
    assert engine.store.only().adapter == 1


def test_an_adapter_that_is_removed_again_is_gone_when_the_store_has_said_so_again(engine):
    gone = []
    for pack in (1, 2):
        engine.host(1, pack)
        engine.adapters.drop(1)
        gone.append(engine.adapters.remove(1))
    engine.store.inbox.append(Forgotten(1))
    engine.poll()
    assert [future.done() for future in gone] == [True, False]
    engine.store.inbox.append(Forgotten(1))
    engine.poll()
    assert gone[1].result()


def test_what_is_requested_for_a_pin_is_not_requested_of_a_removed_adapter(engine):
    engine.host(1)
    engine.adapters.drop(1)
    engine.evict(1)
    engine.adapters.pin(1)
    assert engine.store.load_requests
    engine.adapters.remove(1)
    assert not engine.store.load_requests


def test_an_adapter_that_nobody_waits_for_any_more_is_not_being_read(engine):
    engine.adapters.request_load(lora(1))
    engine.store.reading()
    engine.poll()
    assert engine.adapters.state(1) is AdapterState.READING
    engine.adapters.drop(1)
    engine.adapters.register(lora(1))
    assert engine.adapters.state(1) is AdapterState.QUEUED


@pytest.mark.parametrize("stage", ["queued", "loaded", "filling", "filled", "checking"])
def test_a_removed_adapter_leaves_nothing_at_any_stage(engine, stage):
    registered = None
    if stage == "checking":
        registered = begin_check(engine, 1, 7)
    else:
        engine.adapters.request_load(lora(1))
        if stage != "queued":
            engine.loaded(pack_info(7))
        if stage in ("filling", "filled"):
            engine.bring(1)
        if stage == "filled":
            engine.workers.filled()
    gone = engine.adapters.remove(1)
    engine.check()
    assert not gone.done()
    engine.store.forgets()
    engine.poll()
    assert gone.result(0) is True
    assert engine.adapters.state(1) is AdapterState.ABSENT
    assert engine.adapters.slots.contents == (None, None)
    if registered is not None:
        assert assert_refused(registered).failure.kind is FailureKind.GONE
    engine.all_is_given_back()
    assert engine.adapters.slots.contents == (None, None)
    assert not engine.adapters.known()


def test_the_answers_to_a_removed_adapters_orders_mean_nothing_to_its_successor(engine):
    engine.host(1, 10)
    engine.bring(1)
    old = engine.workers.only()
    engine.adapters.remove(1)
    engine.host(1, 11)
    engine.bring(1)
    engine.filled(old)
    assert engine.adapters.state(1) is AdapterState.HOST
    engine.filled()
    assert engine.adapters.state(1) is AdapterState.SLOT


# Many adapters


@pytest.fixture
def few(monkeypatch) -> int:
    monkeypatch.setattr(known_adapters, "MAX_KNOWN", 4)
    return 4


def known(engine: Engine) -> list[int]:
    return [entry.number for entry in engine.adapters.known()]


def test_those_that_cannot_be_forgotten_keep_none_that_can(engine, few, monkeypatch):
    monkeypatch.setattr(known_adapters, "_TRIES", 2)
    for number in (1, 2):
        engine.adapters.request_load(lora(number))
    for number in (3, 4, 5, 6):
        engine.adapters.request_load(lora(number))
        engine.adapters.drop(number)
    assert known(engine) == [1, 2, 5, 6]


def test_an_adapter_that_was_forgotten_is_asked_for_anew(engine, few):
    engine.adapters.request_load(lora(1))
    engine.failed()
    engine.adapters.drop(1)
    assert engine.adapters.observer.usage.of(1).last_error is not None
    for number in range(2, 6):
        engine.adapters.request_load(lora(number))
    assert 1 not in known(engine)
    assert engine.adapters.observer.usage.of(1).last_error is None
    engine.adapters.request_load(lora(1))
    assert 1 in {load_request.adapter for load_request in engine.store.load_requests.values()}


def test_an_eviction_is_that_of_all_adapters_that_are_the_pack(engine):
    for number in (1, 2):
        engine.host(number, 10)
        engine.adapters.drop(number)
    engine.host(3, 30)
    engine.evict(10)
    states = [engine.adapters.state(number) for number in (1, 2, 3)]
    assert states == [AdapterState.ABSENT, AdapterState.ABSENT, AdapterState.HOST]


# Where the engine waits for the store


@pytest.fixture
def waiting(engines) -> Engine:
    """One whose store has what is wanted, and makes everybody wait until then."""
    engine = engines(wait_s=0.02)
    request_load = engine.store.request_load

    def request_and_load(asked):
        ticket = request_load(asked)
        engine.store.loaded(pack_info(7 if asked.keep else 0, "digest"))
        return ticket

    engine.store.request_load = request_and_load
    return engine


def test_nobody_keeps_room_that_a_store_needs_while_it_makes_everybody_wait(engines):
    """Adapters that wait for a slot would never get one: the engine would wait for the store."""
    engine = engines(wait_s=0.02)
    request_load, asked_with = engine.store.request_load, []

    def request_and_load(asked):
        asked_with.append(dict(engine.store.leased))
        ticket = request_load(asked)
        engine.store.loaded(pack_info(asked.adapter))
        return ticket

    engine.store.request_load = request_and_load
    for number in (1, 2, 3, 4):
        engine.adapters.request_load(lora(number))
    for number in (1, 2):
        assert engine.adapters.is_ready(number)
        assert not engine.adapters.bring(number)
        engine.step()
        engine.filled()
        engine.step(1, number)
    for number in (3, 4, 3, 4):
        assert engine.adapters.is_ready(number)
        assert not engine.adapters.bring(number)
        assert engine.store.leased == {number: 1}
    assert asked_with == [{}] * 6


def test_operators_have_the_answer_at_once_of_a_store_that_makes_everybody_wait(waiting):
    """Nothing wakes an idle engine core to look for it later."""
    assert waiting.adapters.register(lora(1)).result(0) is True
    assert waiting.adapters.pin(1).result(0) is True
    assert waiting.workers.only().pack.pack == 7


def test_step_with_copies_takes_until_workers_have_answered(waiting):
    waiting.workers.answers = waiting.filled
    waiting.adapters.request_load(lora(1))
    assert waiting.store.leased == {}
    assert waiting.adapters.is_ready(1)
    assert not waiting.bring(1)
    waiting.step()
    assert waiting.workers.waited == 1
    assert waiting.bring(1)


def test_load_that_takes_too_long_fails_where_everybody_waits(engines):
    engine = engines(wait_s=0.02)
    engine.adapters.request_load(lora(1))
    begun = time.monotonic()
    assert not engine.adapters.is_ready(1)
    assert time.monotonic() - begun >= 0.02
    assert engine.adapters.failure(1).kind is FailureKind.TIMEOUT
    assert engine.store.load_requests == {}


class Only:
    """Requires a digest of one adapter."""

    def __init__(self, name: str, digest: str) -> None:
        self.name, self.digest = name, digest

    def refuse(self, name: str, digest: str) -> Problem | None:
        if (name, digest) == (self.name, self.digest):
            return None
        return Problem.at(Code.WRONG_DIGEST, name, "digest", digest, self.digest)


def test_other_weights_than_those_required_are_refused_and_kept_by_nobody():
    engine = Engine(2, ranks=1, required=Only("adapter 1", "right"))
    wrong = engine.adapters.register(lora(1))
    engine.loaded(pack_info(1, "wrong"))
    assert wrong.exception().failure.message == "adapter 1: digest is wrong, expected right"
    assert [each["code"] for each in wrong.exception().problems] == ["wrong-digest"]
    right = engine.adapters.register(lora(1))
    engine.loaded(pack_info(2, "right"))
    assert right.result() is True
    assert engine.adapters.request_load(lora(2)) is None
    engine.loaded(pack_info(3, "wrong"))
    assert engine.adapters.failure(2).kind is FailureKind.INVALID
    engine.adapters.drop(2)
    engine.all_is_given_back()


def test_a_changed_file_of_keys_has_adapters_in_memory_looked_at_again(tmp_path):
    keys = tmp_path / "keys.pem"
    keys.write_text("one")
    engine = Engine(1, ranks=1, signing_keys=str(keys))
    engine.adapters.request_load(lora(1))
    assert engine.store.only().fresh
    engine.loaded(pack_info(1))
    for text, is_fresh, is_signed in (
        (None, False, True),
        ("one more", True, False),
        (None, True, True),  # a refusal is no answer for the next one
        (None, False, True),
    ):
        engine.adapters.drop(1)
        if text is not None:
            keys.write_text(text)
        engine.adapters.request_load(lora(1))
        assert engine.store.only().fresh is is_fresh
        waited = engine.store.waited
        engine.adapters.poll(0.001)  # for a lease, and not for files to be read
        assert (engine.store.waited == waited) is is_fresh
        if is_signed:
            engine.store.loaded(pack_info(1), was_read=is_fresh)
        else:
            engine.store.failed()
        engine.poll()
    engine.adapters.drop(1)
    engine.all_is_given_back()


def test_where_keys_are_unknown_or_a_reload_is_asked_for_files_are_looked_at(tmp_path):
    keys = tmp_path / "keys.pem"
    keys.write_text("one")
    engine = Engine(1, ranks=1, signing_keys=str(keys))
    engine.host(1)
    engine.adapters.request_load(lora(1, inplace=True))
    assert engine.store.only().fresh
    keys.unlink()
    for pack in (2, 3):
        engine.loaded(pack_info(pack))
        engine.adapters.drop(1)
        engine.adapters.request_load(lora(1))
        assert engine.store.only().fresh
    engine.adapters.drop(1)
    engine.all_is_given_back()


def test_a_step_in_which_nothing_is_computed_is_no_use_of_an_adapter(engine):
    engine.fill(1)
    seen = []
    engine.adapters.observer.step = seen.append
    engine.adapters.running(frozenset({1}), computes=False)
    assert not seen
    engine.adapters.running(frozenset({1}))
    assert seen == [{1}]


ACME, OTHER = Seal("acme", 1.0, 3), Seal("other")


def test_the_store_learns_whose_requests_wait(engine):
    for seal, owners in ((ACME, ("acme",)), (ACME, ("acme",)), (OTHER, ("acme", "other"))):
        engine.adapters.request_load(lora(1), seal)
        load_request = engine.store.only()
        assert (load_request.owners, load_request.most) == (owners, 3)
    engine.adapters.drop(1)
    engine.adapters.request_load(lora(1))
    load_request = engine.store.only()
    assert (load_request.owners, load_request.most) == ((), None)


def test_an_adapter_that_is_lost_while_requests_wait_is_asked_for_in_their_tenants_name(engine):
    engine.adapters.request_load(lora(1), OTHER)
    engine.loaded(pack_info(1))
    engine.restart_store()
    assert not engine.adapters.is_ready(1)
    assert engine.store.only().owners == ("other",)
