"""Requests run when their adapter is in its slot, or fail alone."""

import itertools
import random
import statistics
import time
from queue import Queue
from threading import Thread
from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreRequestType, FinishReason
from vllm.v1.request import RequestStatus

from tests.engine.executors import StartedExecutor
from tests.engine.fake_engine import Engine, lora, pack_info
from tests.engine.scheduling.fake_scheduler import AwareScheduler, FakeOutput, FakeRequest
from tests.engine.scheduling.real_scheduler import Steps, make_config
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.blends import blended
from vllm_multilora.integration.engine.adapters import users
from vllm_multilora.integration.engine.requests.prefix_keys import VERSION
from vllm_multilora.integration.engine.requests.tenant_wall import SEAL
from vllm_multilora.integration.engine.scheduling import scheduler as scheduler_module
from vllm_multilora.integration.seals import Seal
from vllm_multilora.integration.worker_link.fill_link import Missing
from vllm_multilora.slots.fairness.slot_turns import PATIENCE_STEPS

NUMBERS = itertools.count()


def config(slots: int) -> SimpleNamespace:
    """What the scheduler asks of vLLM's configuration."""
    lora_config = SimpleNamespace(max_loras=slots)
    return SimpleNamespace(lora_config=lora_config, additional_config={})


class Server:
    """A scheduler with its adapters; the test plays the store and the workers."""

    def __init__(self, slots: int = 2, **options) -> None:
        self.engine = Engine(slots, ranks=1, **options)
        self.scheduler = AwareScheduler(vllm_config=config(slots))
        self.scheduler.attach_adapters(self.engine.adapters)
        self.ended: dict[str, str] = {}

    def ask(self, name: str, number: int | None = None, **options) -> FakeRequest:
        grammar = options.pop("has_grammar", True)
        request = FakeRequest(name, lora(number, **options) if number else None, grammar)
        self.scheduler.add_request(request)
        return request

    def step(self, *done: str) -> set[str]:
        """One step, at whose end these requests are done; returns the requests in it.

        What was said since the last one came before that one's end, which looks for it.
        """
        self.engine.adapters.poll()
        output = self.scheduler.schedule()
        found = self.names
        adapters = self.engine.adapters
        for request in self.scheduler.running:
            if request.lora_request is not None:
                number = request.lora_request.lora_int_id
                assert adapters.slots.is_filled(number, adapters.slots.pack_in(number))
        for outputs in self.scheduler.update_from_output(output, FakeOutput(done)).values():
            for last in outputs.outputs:
                assert last.finish_reason is FinishReason.ERROR
                self.ended[last.request_id] = last.stop_reason
        self.engine.check()
        return found

    @property
    def names(self) -> set[str]:
        return {request.request_id for request in self.scheduler.running}

    def serve(self, *done: str) -> set[str]:
        """A step before which the store and the workers have answered everything."""
        self.engine.answer()
        return self.step(*done)

    def settle(self) -> None:
        """An adapter that a request waits for is loaded, copied to its slot, and used."""
        for _ in range(3):
            self.serve()

    def start(self, name: str, number: int, **options) -> None:
        """Has a request running."""
        self.ask(name, number, **options)
        self.settle()
        assert name in self.names

    def abort(self, *names: str) -> None:
        self.scheduler.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)


@pytest.fixture(autouse=True)
def no_naps(monkeypatch):
    monkeypatch.setattr(scheduler_module, "_IDLE_S", 0.0)
    monkeypatch.setattr(scheduler_module, "engine_recorder", lambda config: None)


@pytest.fixture
def servers():
    made: list[Server] = []

    def make(slots: int = 2, **options) -> Server:
        made.append(Server(slots, **options))
        return made[-1]

    yield make
    for server in made:
        server.abort(*server.scheduler.requests)
        server.engine.all_is_given_back()


@pytest.fixture
def server(servers) -> Server:
    return servers()


def test_where_vllm_loads_adapters_nothing_is_kept_of_those_that_came_and_went(monkeypatch):
    monkeypatch.setattr(users, "MAX_KNOWN", 10)
    scheduler = AwareScheduler(vllm_config=config(2))
    for number in range(1, 100):
        scheduler.add_request(FakeRequest(f"request {number}", lora(number)))
        scheduler.schedule()
        scheduler.finish_requests([f"request {number}"], RequestStatus.FINISHED_ABORTED)
    assert not scheduler._freed.of(range(100))
    assert len(scheduler.users.accepted) <= 21


def test_the_store_learns_whose_request_waits(server):
    request = FakeRequest("one", lora(1))
    SEAL.set(request, Seal("acme", 2.0, 5))
    server.scheduler.add_request(request)
    load_request = server.engine.store.only()
    assert (load_request.owners, load_request.most) == (("acme",), 5)


def test_a_request_waits_for_its_load_and_its_slot_and_others_go_on(server):
    server.ask("base")
    server.ask("tenant", 1)
    assert server.step() == {"base"}
    server.engine.answer()  # loaded
    assert server.step() == {"base"}
    assert server.step() == {"base"}
    server.engine.answer()  # filled
    assert server.step() == {"base", "tenant"}


def test_an_adapter_without_a_request_left_is_dropped(server):
    server.ask("tenant", 1)
    server.abort("tenant")
    assert not server.engine.store.load_requests


def test_what_is_measured_of_a_request_ends_with_it(server):
    seen = []
    server.scheduler.request_metrics = SimpleNamespace(
        accept=lambda request, number, name, *, is_ready: seen.append((request, is_ready)),
        finish=lambda request, number: seen.append((request, number)),
    )
    server.ask("cold", 1)
    server.settle()
    server.ask("warm", 1)
    server.abort("cold", "warm")
    assert seen == [("cold", False), ("warm", True), ("cold", 1), ("warm", 1)]


def test_a_version_that_nobody_waits_for_any_more_is_given_back(server):
    server.start("running", 1)
    server.ask("newer", 1, inplace=True)
    server.engine.store.loaded(pack_info(11))
    server.step()
    server.abort("newer")
    server.step("running")
    assert not server.engine.store.leased


def test_a_failure_ends_the_requests_of_its_adapter_and_no_others(server):
    server.start("good", 1)
    for name in ("bad", "worse"):
        server.ask(name, 2)
    server.engine.store.failed(kind=FailureKind.GONE)
    server.step()
    assert server.ended.keys() == {"bad", "worse"}
    assert "could not be loaded: it is bad" in server.ended["bad"]
    assert server.step() == {"good"}
    server.ask("again", 2)
    server.step()
    server.serve()
    assert server.serve() == {"good", "again"}


def test_a_failure_ends_those_that_waited_although_more_keep_coming(server):
    """Each new request is a new try, with an answer of its own."""
    server.start("running", 2)
    for number in range(4):
        server.ask(f"request {number}", 1)
        server.step()
        server.engine.store.failed()
        server.engine.adapters.poll()  # as before each client's request
    assert server.ended.keys() == {"request 0", "request 1", "request 2"}
    assert server.step() == {"running"}
    assert "request 3" in server.ended


class Many(dict):
    """Requests, so many that nobody is to look at all of them."""

    def values(self):
        raise AssertionError("all requests were looked at")


def test_who_asks_for_a_bad_adapter_again_and_again_costs_the_others_nothing(server):
    server.ask("bad", 1)
    server.engine.store.failed()
    server.step()
    assert server.ended.keys() == {"bad"}
    server.scheduler.requests = Many(server.scheduler.requests)
    server.ask("again", 1)
    server.scheduler.requests = dict(server.scheduler.requests.items())
    assert server.engine.store.only().adapter == 1


def test_a_failure_ends_no_session_that_waits_for_input(server):
    session = server.ask("session", 1, has_grammar=False)
    session.status = RequestStatus.WAITING_FOR_STREAMING_REQ
    server.ask("request", 1)
    server.engine.store.failed()
    server.engine.adapters.poll()
    server.ask("again", 1)
    server.step()
    assert server.ended.keys() == {"request"}


def test_a_failure_ends_no_later_request_of_the_same_name(server):
    server.ask("again", 1)
    server.engine.store.failed()
    server.step()
    assert server.ended.keys() == {"again"}
    server.ask("again", 1)
    server.settle()
    assert server.names == {"again"}


def test_a_request_that_holds_what_other_weights_have_computed_ends_when_these_are_replaced(server):
    held = server.ask("held", 1)
    server.settle()
    server.scheduler.running.remove(held)
    server.scheduler._preempt_request(held, 0.0)
    held.num_computed_tokens = 4
    server.ask("reload", 1, inplace=True)
    server.engine.store.loaded(pack_info(11))
    served = [server.serve() for _ in range(4)]
    assert server.ended.keys() == {"held"}
    assert set().union(*served) == {"reload"}


def test_tokens_computed_without_an_adapter_are_thrown_away(server):
    server.start("good", 1)
    server.start("lost", 2)
    server.engine.workers.say(Missing(2), ranks=[0])
    server.step()
    assert server.ended.keys() == {"lost"}
    assert server.scheduler.kv_cache_manager.evicted == {"lost"}
    server.start("again", 2)
    assert server.names == {"good", "again"}


def test_a_request_that_has_not_run_does_not_end_with_those_that_ran_without_its_adapter(server):
    server.start("lost", 2)
    waiting = server.ask("waiting", 2, has_grammar=False)
    server.engine.workers.say(Missing(2), ranks=[0])
    server.step()
    assert server.ended.keys() == {"lost"}
    waiting.has_grammar = True
    server.settle()
    assert server.names == {"waiting"}


@pytest.mark.parametrize("end", ["preempted", "aborted"])
def test_cached_blocks_that_were_given_back_before_the_loss_was_known_are_thrown_away(server, end):
    server.start("good", 1)
    server.start("lost", 2)
    server.scheduler.schedule()
    if end == "preempted":
        server.scheduler._preempt_request(server.scheduler.running.pop(), 0.0)
    else:
        server.abort("lost")
    server.engine.workers.say(Missing(2), ranks=[0])
    server.scheduler.update_from_output(None, FakeOutput())
    assert server.scheduler.requests.keys() == {"good"}
    assert server.scheduler.kv_cache_manager.evicted == {"lost"}


def test_cached_blocks_of_steps_that_are_long_over_are_kept(server):
    server.start("before", 2)
    server.abort("before")
    server.start("lost", 2)
    for _ in range(20):
        server.step()
    server.engine.workers.say(Missing(2), ranks=[0])
    server.step()
    assert server.scheduler.kv_cache_manager.evicted == {"lost"}


def test_a_reload_that_fails_ends_the_request_that_asked_for_it_and_no_other(server):
    server.start("running", 1)
    server.ask("reload", 1, inplace=True)
    server.ask("other", 1)
    server.engine.store.failed()
    server.step()
    assert server.ended.keys() == {"reload"}
    assert "it is bad" in server.ended["reload"]
    assert server.step() == {"running", "other"}
    server.ask("later", 1)
    assert server.step() == {"running", "other", "later"}


def test_a_reload_that_fails_is_reported_though_others_of_its_adapter_wait_for_a_slot(servers):
    server = servers(1)
    server.start("long", 2)
    server.ask("other", 1)
    for _ in range(2):
        server.serve()
    server.ask("reload", 1, inplace=True)
    server.engine.store.failed()
    server.step()
    assert server.ended.keys() == {"reload"}
    server.serve("long")
    for _ in range(4):
        server.serve()
    assert server.names == {"other"}


def test_requests_that_wait_for_a_slot_end_when_their_weights_are_quarantined(servers):
    server = servers(1)
    server.start("long", 2)
    waiting = [server.ask(name, 1) for name in ("first", "second")]
    for _ in range(2):
        server.serve()
    output = SimpleNamespace(req_ids=["r"], num_nans_in_logits={"r": 1}, pooler_output=None)
    VERSION.set(ran := FakeRequest("r", lora(3)), server.engine.adapters.version(1).digest)
    server.engine.adapters.take_quarantined(output, {"r": ran})
    server.step()
    assert server.ended.keys() == {request.request_id for request in waiting}


def test_a_first_load_that_fails_ends_all_though_one_has_asked_for_a_reload(server):
    server.ask("reload", 1, inplace=True)
    server.ask("other", 1)
    server.engine.store.failed()
    server.step()
    assert server.ended.keys() == {"reload", "other"}


def test_a_reload_is_not_answered_by_one_that_was_under_way(server):
    """The load under way may have opened the files before they were written again."""
    server.start("running", 1)
    server.ask("first", 1, inplace=True)
    server.ask("second", 1, inplace=True)
    server.ask("third", 1)
    server.engine.store.loaded(pack_info(11))
    server.step("running")
    server.settle()
    assert server.names == {"first"}
    assert server.engine.adapters.version(1).pack == 11
    server.step()
    assert server.engine.store.only().fresh
    server.engine.store.loaded(pack_info(12))
    server.step("first")
    server.settle()
    assert server.names == {"second", "third"}
    assert server.engine.adapters.version(1).pack == 12


def test_a_reload_that_was_held_back_and_cannot_be_asked_for_fails(server):
    server.ask("first", 1, inplace=True)
    server.ask("other", 1, path="/elsewhere", inplace=True)
    for _ in range(4):
        server.serve()
    assert server.names == {"first"}
    assert "its number 1 is that of adapter 'adapter 1'" in server.ended["other"]


@pytest.mark.parametrize("end", ["failed", "aborted", "ended while its blocks are sent"])
def test_a_reload_that_waits_for_another_one_is_asked_for_when_that_is_over(server, end):
    """And neither fails with that one nor is answered by it, as by none that was under way."""
    server.start("running", 1)
    first = server.ask("first", 1, inplace=True)
    server.ask("second", 1, inplace=True)
    if end == "failed":
        server.engine.store.failed()
    elif end == "aborted":
        server.abort("first")
    else:
        server.scheduler.waiting.remove(first)
        first.status = RequestStatus.FINISHED_ABORTED
    server.step()
    if end != "failed":
        server.engine.store.loaded(pack_info(11))
    server.step("running")
    assert server.engine.store.only().fresh
    server.settle()
    assert server.names == {"second"}
    assert server.ended.keys() == ({"first"} if end == "failed" else set())
    if end.startswith("ended"):
        server.scheduler._free_request(first)


def test_a_reload_that_waits_for_its_slot_keeps_its_turn_while_reloads_keep_coming(servers):
    """Reloads also come after the store has answered the first one."""
    server = servers(1)
    server.start("long", 2)
    server.ask("first", 1, inplace=True)
    server.serve()
    server.ask("other", 3)
    for number in range(2 * PATIENCE_STEPS):
        server.ask(f"reload {number}", 1, inplace=True)
        assert server.serve() == {"long"}
    server.step("long")
    server.ask("last", 1, inplace=True)
    server.settle()
    assert server.names == {"first"}
    for _ in range(12):
        server.serve(*server.names)
    assert not server.scheduler.requests
    assert not server.ended


def test_a_reload_that_was_held_back_is_as_safe_from_later_ones(server):
    server.ask("first", 1, inplace=True)
    server.ask("second", 1, inplace=True)
    server.settle()
    server.step()
    assert server.names == {"first"}
    server.engine.store.loaded(pack_info(11))
    server.step()
    server.ask("third", 1, inplace=True)
    server.step("first")
    assert not server.engine.store.load_requests
    server.settle()
    assert server.names == {"second"}


def test_many_requests_that_wait_for_a_reload_are_distinguished_quickly(server):
    comparisons = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            nonlocal comparisons
            comparisons += 1
            return str.__eq__(self, other)

    server.ask("first", 1, inplace=True)
    names = [Name(f"reload {number}") for number in range(200)]
    for name in names:
        server.ask(name, 1, inplace=True)
    server.step()
    comparisons = 0
    server.step()
    assert comparisons < 2 * len(names)


def test_a_reload_waits_for_no_session_that_waits_for_input(server):
    server.start("session", 1, inplace=True)
    session = server.scheduler.running.pop()
    session.status, session.num_computed_tokens = RequestStatus.WAITING_FOR_STREAMING_REQ, 5
    session.has_grammar = False  # the fake's way to keep it waiting
    server.scheduler.waiting.append(session)
    server.ask("reload", 1, inplace=True)
    for _ in range(4):
        server.serve()
    assert server.names == {"reload"}


def test_a_preempted_request_does_not_fail_with_a_later_reload(server):
    server.start("first", 1, inplace=True)
    server.ask("reload", 1, inplace=True)
    server.engine.store.failed()
    server.scheduler._preempt_request(server.scheduler.running.pop(), 0.0)
    server.step()
    assert server.ended.keys() == {"reload"}
    assert server.step() == {"first"}


def test_a_request_that_waits_for_its_grammar_takes_no_slot(server):
    request = server.ask("tenant", 1, has_grammar=False)
    server.settle()
    assert not server.engine.workers.sent
    request.has_grammar = True
    server.step()
    assert server.serve() == {"tenant"}


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_slot_is_given_away_in_the_next_step_unless_the_last_may_still_use_it(servers, overlaps):
    server = servers(slots=1, copy_s=0 if overlaps else 1e-4)
    server.start("first", 1)
    server.ask("other", 2)
    server.serve("first")
    server.step()
    assert (server.engine.workers.sent[-1].request == lora(2)) is not overlaps
    server.step()
    assert server.engine.workers.only().request == lora(2)


@pytest.mark.parametrize(
    ("adapters", "slots", "requests", "pause", "longest", "late", "copy_s"),
    [
        pytest.param(4, 1, 4, 0, 6, 10, 1e-4, id="never without requests"),
        pytest.param(8, 2, 1, 5, 12, 20, 0, id="without requests for a while after each"),
    ],
)
def test_an_adapter_whose_leases_come_late_waits_no_longer_than_those_that_share_its_slots(
    servers, adapters, slots, requests, pause, longest, late, copy_s
):
    """Copies are late, too, but for some; each client waits so long before its next request."""
    server, random_numbers = servers(slots=slots, copy_s=copy_s), random.Random(0)
    store, workers, numbers = server.engine.store, server.engine.workers, range(1, adapters + 1)
    came, lengths, due = dict[str, int](), dict[str, int](), dict[object, int]()
    ready = {number: [0] * requests for number in numbers}  # when each client asks again
    waited: dict[int, list[int]] = {number: [] for number in numbers}

    def copy() -> None:
        """Fills the slots of odd adapters while the step waits for them."""
        for order in [each for each in workers.orders if each.request.lora_int_id % 2]:
            workers.filled(order)

    workers.answers = copy
    for step in range(2000):
        for number in numbers:
            for _ in range(sum(when <= step for when in ready[number])):
                ready[number].remove(min(ready[number]))
                name = f"request {next(NUMBERS)}"
                came[name], lengths[name] = step, random_numbers.randint(1, longest)
                server.ask(name, number)
        for load_request in list(store.load_requests.values()):
            if (
                due.setdefault(
                    ("want", load_request.ticket), step + late * (load_request.adapter == 1)
                )
                <= step
            ):
                store.loaded(pack_info(load_request.adapter), load_request)
        for order in list(workers.orders):
            if due.setdefault(("order", order.order), step + random_numbers.randint(0, 3)) <= step:
                workers.filled(order)
        done = [r for r in server.scheduler.running if r.steps >= lengths[r.request_id]]
        for request in done:
            number = request.lora_request.lora_int_id
            waited[number].append(step - came[request.request_id])
            ready[number].append(step + 1 + pause)
        server.step(*(request.request_id for request in done))
    means = [statistics.mean(waited[number]) for number in numbers]
    assert max(means) < 1.25 * min(means), means


def test_one_that_comes_to_host_memory_before_its_lease_has_its_place_in_line_from_then_on(servers):
    """As when it is registered while a request waits for it."""
    server = servers(slots=1)
    store = server.engine.store
    server.start("running", 1)
    server.ask("first", 2)
    server.step()
    server.engine.adapters.register(lora(2))
    store.loaded(
        pack_info(2),
        next(
            load_request for load_request in store.load_requests.values() if not load_request.keep
        ),
    )
    server.step()
    server.ask("second", 3)
    store.loaded(
        pack_info(3),
        next(
            load_request
            for load_request in store.load_requests.values()
            if load_request.adapter == 3
        ),
    )
    for _ in range(PATIENCE_STEPS):
        server.step()
    server.serve("running")
    while not server.names:
        server.serve()
    assert server.names == {"first"}


def test_a_slot_is_not_kept_for_an_adapter_that_is_not_there(servers):
    server = servers(slots=1)
    server.ask("hangs", 1)
    for _ in range(2 * PATIENCE_STEPS):
        server.step()
    server.ask("other", 2)
    load_request = next(w for w in server.engine.store.load_requests.values() if w.adapter == 2)
    server.engine.store.loaded(pack_info(2), load_request)
    server.step()
    server.engine.workers.filled()
    assert server.step() == {"other"}


def test_pinned_adapters_leave_one_slot_to_all_others_and_take_no_turns(servers):
    server = servers(pinned=["adapter 1"])
    server.start("pinned", 1)
    server.serve("pinned")
    for number in (2, 3, 4):
        server.start(f"request {number}", number)
        server.serve(f"request {number}")
        server.step()
    assert server.engine.adapters.slots.slot_of(1) is not None
    server.ask("pinned", 1)
    assert server.step() == {"pinned"}


def overlapping(server, *numbers):
    """A step; requests of these adapters run for 6 steps, and the next is there after 3."""
    for number in numbers:
        mine = [r for r in server.scheduler.requests.values() if r.lora_request == lora(number)]
        if all(request.steps >= 3 for request in mine):
            server.ask(f"request {next(NUMBERS)}", number)
    return server.serve(*(r.request_id for r in server.scheduler.running if r.steps >= 6))


def test_an_adapter_that_is_pinned_while_all_slots_are_busy_gets_one(servers):
    server = servers(slots=3)
    for _ in range(10):
        overlapping(server, 1, 2, 3)
    server.engine.adapters.register(lora(4))
    server.serve()
    server.engine.adapters.pin(4)
    server.ask("pinned", 4)
    assert any("pinned" in overlapping(server, 1, 2, 3) for _ in range(12))


def test_no_slot_is_kept_for_an_adapter_that_was_pinned_while_it_waited_for_one(servers):
    server = servers(slots=2)
    server.start("one", 1)
    server.start("two", 2)
    server.ask("pinned", 3)
    server.serve()
    server.engine.adapters.pin(3)
    server.serve("one", "two")
    for _ in range(PATIENCE_STEPS):
        server.serve()
    server.start("other", 4)
    assert server.names == {"pinned", "other"}


def test_requests_whose_slots_are_lost_are_paused_and_go_on(server):
    server.start("one", 1)
    server.start("two", 2)
    server.engine.adapters.slots_lost()
    assert server.step() == set()
    assert set(server.scheduler.preempted) == {"one", "two"}
    server.settle()
    assert server.names == {"one", "two"}


def test_a_paused_request_asks_for_no_reload_again(server):
    server.start("one", 1, inplace=True)
    server.engine.adapters.slots_lost()
    server.step()
    assert not server.engine.store.only().fresh


def test_an_adapter_retires_when_its_last_request_has_ended(server):
    server.start("tenant", 1)
    done = []
    server.scheduler.retire_adapter(1, 100.0, done.append)
    server.step()
    assert not done
    assert server.scheduler.users.accepted[1] == 1
    server.step("tenant")
    assert done == [True]
    assert server.scheduler.users.accepted[1] == 0


def test_all_that_unload_an_adapter_are_answered_and_the_first_time_limit_holds(server):
    server.start("tenant", 1)
    done = []
    server.scheduler.retire_adapter(1, -1.0, lambda leaves: done.append("first"))
    server.scheduler.retire_adapter(1, 100.0, lambda leaves: done.append("second"))
    server.step()
    server.step()
    assert "was unloaded" in server.ended["tenant"]
    assert done == ["first", "second"]


def test_an_adapter_that_is_registered_again_while_it_is_about_to_leave_stays(server, monkeypatch):
    """As one of a directory whose folder is put back as it was: its number is the same."""
    clock = SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr(users, "time", clock)
    executor = StartedExecutor(server.scheduler, config(2), Queue())
    blend = blended([(lora(1), 0.5), (lora(2), 0.5)])
    server.start("before", 1)
    server.scheduler.add_request(FakeRequest("blended", blend))
    removed = executor.remove_lora(1)
    assert not removed.done()
    assert executor.add_lora(lora(1)).result(0)
    assert removed.result(0)
    server.ask("after", 1)
    clock.monotonic = lambda: 1e9
    server.settle()
    assert server.names == {"before", "after", "blended"}
    server.step("before", "after", "blended")
    assert server.engine.adapters.version(1) is not None


def test_an_adapters_blends_leave_with_it(server):
    executor = StartedExecutor(server.scheduler, config(2), Queue())
    blend = blended([(lora(1), 0.5), (lora(2), 0.5)])
    server.start("part", 1)
    server.step("part")
    server.scheduler.add_request(FakeRequest("blended", blend))
    server.abort("blended")
    removed = executor.remove_lora(1)
    assert sorted(server.engine.store.forgotten) == [1, blend.lora_int_id]
    server.engine.store.forgets()
    server.engine.adapters.poll()
    assert removed.result(0)


@pytest.mark.parametrize("is_running", [True, False], ids=["running", "waiting"])
def test_requests_that_outlive_the_time_limit_are_ended(server, is_running):
    server.start("good", 1)
    if is_running:
        server.start("slow", 2)
    else:
        server.ask("slow", 2)
    done = []
    server.scheduler.retire_adapter(2, -1.0, done.append)
    server.step()
    server.step()
    assert "was unloaded" in server.ended["slow"]
    assert done == [True]
    assert server.step() == {"good"}


def test_without_adapters_nothing_waits():
    scheduler = AwareScheduler(vllm_config=config(1))
    scheduler.add_request(FakeRequest("tenant", lora(1)))
    step = scheduler.schedule()
    assert step.total_num_scheduled_tokens == 1
    assert scheduler.update_from_output(step, FakeOutput()) == {}


@pytest.mark.parametrize(("between", "polls"), [("nothing", 1), ("a request", 2)])
def test_a_step_looks_for_news_once_unless_a_request_has_come(server, monkeypatch, between, polls):
    server.start("tenant", 1)
    seen, poll = [], server.engine.adapters.poll
    output = server.scheduler.schedule()
    monkeypatch.setattr(server.engine.adapters, "poll", lambda *_: seen.append(poll()))
    server.scheduler.update_from_output(output, FakeOutput())
    if between == "a request":
        server.ask("other", 2)
    assert server.scheduler.schedule().total_num_scheduled_tokens == 1
    assert len(seen) == polls


def test_where_steps_are_scheduled_ahead_each_of_them_looks_for_news(server, monkeypatch):
    server.start("tenant", 1)
    seen, poll = [], server.engine.adapters.poll
    server.scheduler.update_from_output(server.scheduler.schedule(), FakeOutput())
    monkeypatch.setattr(server.engine.adapters, "poll", lambda *_: seen.append(poll()))
    server.scheduler.schedule()
    assert len(seen) == 0
    server.scheduler.schedule()
    assert len(seen) == 1


@pytest.mark.parametrize("waits_for", ["a load and a copy", "a reload of an aborted request"])
def test_steps_that_compute_nothing_take_their_time_while_requests_are_held_back(
    server, monkeypatch, waits_for
):
    """Or the engine would have workers do nothing as often as they can."""
    naps: list[float] = []
    clock = SimpleNamespace(sleep=naps.append, monotonic=time.monotonic)
    monkeypatch.setattr(scheduler_module, "time", clock)
    server.step()
    assert len(naps) == 0
    server.ask("first", 1, inplace=True)
    if waits_for != "a load and a copy":
        server.ask("second", 1, inplace=True)
        server.abort("first")
    server.step()
    assert len(naps) == 1
    server.engine.store.loaded(pack_info(10))
    server.step()
    assert len(naps) == 2
    server.settle()
    assert server.names
    count = len(naps)
    server.ask("another", 2)
    server.step()
    assert len(naps) == count


class RealServer:
    """As `Server`, over vLLM's scheduler: the store and the workers answer before each step."""

    def __init__(self, folder, max_loras=2, **options) -> None:
        self.engine = Engine(max_loras, ranks=1)
        self.config = make_config(folder, places=4, step_tokens=64, max_loras=max_loras, **options)
        self.steps = Steps(self.config)
        self.scheduler = self.steps.scheduler
        self.scheduler.attach_adapters(self.engine.adapters)

    def step(self) -> None:
        self.engine.answer()
        self.steps.step()

    def start_session(self) -> FakeRequest:
        """A request for adapter 1 that waits for more input."""
        session = self.steps.ask("session", adapter=1, generate=2, resumable=True)
        for _ in range(10):
            self.step()
        assert session.status is RequestStatus.WAITING_FOR_STREAMING_REQ
        return session


def test_requests_are_taken_by_their_priorities_where_vllm_is_set_to(tmp_path):
    server = RealServer(tmp_path, policy="priority")
    for number in range(4):
        server.steps.ask(f"running {number}", generate=8)
    server.step()
    for priority in (3, 1, 2):
        server.steps.ask(f"late {priority}", generate=8, priority=priority)
    for _ in range(40):
        server.step()
    late = [name for name in server.steps.finished if name.startswith("late")]
    assert late == ["late 1", "late 2", "late 3"]


@pytest.mark.parametrize(("policy", "fair"), [("fcfs", True), ("fcfs", False), ("priority", False)])
def test_of_very_many_that_wait_for_an_adapter_steps_look_at_one(tmp_path, policy, fair):
    """And at none until the store has answered."""
    server = RealServer(tmp_path, fair_shares=fair, policy=policy)
    server.steps.ask("running", adapter=1, generate=50)
    for _ in range(5):
        server.step()
    asked, adapters, scheduler = [], server.engine.adapters, server.scheduler
    is_ready = adapters.is_ready
    adapters.is_ready = lambda number, **of: asked.append(number) or is_ready(number, **of)
    for number in range(300):
        server.steps.ask(f"cold {number:3}", adapter=2, generate=1)
    looked, look = [], scheduler._handle_blocked_waiting_request
    scheduler._handle_blocked_waiting_request = lambda r: looked.append(r) or look(r)
    for _ in range(5):
        server.steps.step()  # the store says nothing
    assert len(asked) == len(looked) == 1
    assert scheduler.get_request_counts() == (1, 300)
    assert len(scheduler.deferred_waiting) == 300
    for _ in range(200):
        server.step()
    assert not scheduler.requests
    cold = [name for name in server.steps.finished if name.startswith("cold")]
    assert cold == [f"cold {number:3}" for number in range(300)]


def test_adapters_have_their_turns_however_seldom_there_is_a_place_in_the_batch(tmp_path):
    """While the batch is full nobody is asked, and the weights of those that wait are copied."""
    server = RealServer(tmp_path, max_loras=1)
    numbers = range(1, 7)
    for number in numbers:
        server.steps.ask(f"adapter {number}", adapter=number, generate=4)
    for number in range(200):
        server.steps.ask(f"base {number}", generate=16)
    for _ in range(200):
        server.step()
    ended = [name for name in server.steps.finished if name.startswith("adapter")]
    assert ended == [f"adapter {number}" for number in numbers]


def test_a_session_that_waits_for_input_keeps_no_slot_that_an_aborted_request_requested(tmp_path):
    server = RealServer(tmp_path, max_loras=1)
    server.start_session()
    server.steps.ask("first", adapter=2, generate=2 * PATIENCE_STEPS)
    for _ in range(5):
        server.step()
    server.steps.ask("aborted", adapter=1)
    for _ in range(PATIENCE_STEPS):
        server.step()
    server.steps.abort("aborted")
    server.steps.ask("second", adapter=2)
    for _ in range(4 * PATIENCE_STEPS):
        server.step()
    assert server.scheduler.requests.keys() == {"session"}


def test_more_input_of_a_session_is_no_other_request(tmp_path):
    server = RealServer(tmp_path)
    server.start_session()
    server.steps.ask("session", adapter=1, generate=2, resumable=True)
    for _ in range(10):
        server.step()
    assert server.scheduler.users[1] == 1
    server.steps.abort("session")
    assert server.scheduler.users[1] == 0


def test_the_end_of_a_sessions_input_does_not_ask_for_its_adapter(tmp_path):
    server = RealServer(tmp_path)
    server.start_session()
    server.engine.adapters.slots_lost()
    server.steps.ask("session", adapter=1)  # the end has the adapter, too
    assert not server.scheduler.requests
    for _ in range(3):
        server.step()
    assert not server.engine.store.leased
    assert not server.engine.store.load_requests


def test_input_for_a_session_that_has_ended_while_its_blocks_are_sent_asks_for_nothing(tmp_path):
    """A KV connector sends them on, and vLLM keeps the request until then."""
    server = RealServer(tmp_path)
    session = server.start_session()
    server.engine.adapters.slots_lost()
    server.scheduler._connector_finished = lambda request: (True, None)
    server.steps.abort("session")
    server.steps.ask("session", adapter=1, resumable=True)
    assert session.is_finished()
    assert not server.engine.store.load_requests


def test_the_end_of_a_sessions_input_asks_for_nothing_on_behalf_of_others(tmp_path):
    server = RealServer(tmp_path)
    server.start_session()
    server.steps.ask("other", adapter=1, generate=500)
    server.steps.ask("session", adapter=1, inplace=True)
    assert set(server.scheduler.requests) == {"other"}
    assert not server.engine.store.load_requests


@pytest.mark.parametrize(
    "pause", [PauseState.UNPAUSED, PauseState.PAUSED_NEW, PauseState.PAUSED_ALL]
)
def test_an_engine_without_steps_ends_the_requests_of_an_unloaded_adapter_in_time(tmp_path, pause):
    """A session that waits for input, a request that came in a pause, one that a pause stops."""
    server = RealServer(tmp_path, unload_timeout_s=0.01)
    if pause is PauseState.UNPAUSED:
        server.start_session()
    else:
        server.steps.ask("request", adapter=1, generate=500)
    if pause is PauseState.PAUSED_ALL:
        for _ in range(5):
            server.step()
        assert server.scheduler.running
    server.scheduler.set_pause_state(pause)
    inputs = Queue()
    executor = StartedExecutor(server.scheduler, server.config, inputs)
    removed = executor.remove_lora(1)
    assert inputs.get(timeout=60)[0] is EngineCoreRequestType.WAKEUP
    for _ in range(3):
        if server.scheduler.has_requests():
            server.step()
    assert not server.scheduler.requests
    server.engine.store.forgets()
    server.engine.poll()
    assert removed.result(timeout=0)


@pytest.mark.parametrize("pause", [PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
def test_a_paused_engine_answers_calls_and_keeps_no_other_engine_from_host_memory(tmp_path, pause):
    """Its requests may wait for hours, and vLLM asks whether there are any before it waits, too."""
    server = RealServer(tmp_path)
    store, scheduler = server.engine.store, server.scheduler
    executor = StartedExecutor(scheduler, server.config, Queue())
    server.steps.ask("running", adapter=1, generate=20)
    for _ in range(5):
        server.step()
    assert scheduler.running
    for number in (2, 3):
        server.steps.ask(f"before {number}", adapter=number)
    server.engine.answer()
    server.step()
    assert store.leased == {2: 1, 3: 1}
    registered = executor.add_lora(lora(5))
    server.engine.answer()  # after the end of the last step has looked
    scheduler.set_pause_state(pause)
    while scheduler.has_requests():  # what runs goes on
        server.step()
    assert scheduler.running == [] or pause is PauseState.PAUSED_ALL
    assert registered.result(timeout=0)
    assert not store.leased
    server.steps.ask("meanwhile", adapter=4)
    server.engine.answer()
    assert not scheduler.has_requests()
    assert not store.leased
    scheduler.set_pause_state(PauseState.UNPAUSED)
    for _ in range(30):
        server.step()
    assert not scheduler.requests
    assert not store.leased


def test_an_engine_that_is_called_directly_removes_an_adapter_in_its_callers_steps(tmp_path):
    """Nobody else takes any, so that whoever waits for its requests waits for ever."""
    server = RealServer(tmp_path, unload_timeout_s=0.01)
    server.steps.ask("request", adapter=1, generate=500)
    for _ in range(5):
        server.step()
    assert server.scheduler.running
    executor = StartedExecutor(server.scheduler, server.config)
    answers = Queue()
    Thread(target=lambda: answers.put(executor.remove_lora(1)), daemon=True).start()
    assert answers.get(timeout=20) is True
    deadline = time.monotonic() + 20
    while server.scheduler.requests:
        assert time.monotonic() < deadline
        server.step()
    assert server.engine.store.forgotten == [1]
    assert server.engine.adapters.version(1) is None


def test_an_engine_that_is_called_directly_says_that_an_adapter_was_not_known(server):
    executor = StartedExecutor(server.scheduler, config(2))
    assert executor.remove_lora(1) is False


def test_an_engine_that_is_called_directly_registers_an_adapter_while_others_fill_host_memory(
    tmp_path,
):
    """Nobody takes the step in which they would get slots; the adapter's own request waits, too."""
    server = RealServer(tmp_path)
    store, adapters = server.engine.store, server.engine.adapters
    server.steps.ask("first", adapter=1)
    server.engine.answer()
    adapters.poll()
    assert store.leased == {1: 1}
    server.steps.ask("second", adapter=2)
    give_back = store.release

    def release(pack: int) -> None:
        give_back(pack)
        if not store.leased:
            server.engine.answer()

    store.release = release
    executor = StartedExecutor(server.scheduler, server.config)
    second = server.scheduler.requests["second"].lora_request
    answers = Queue()
    Thread(target=lambda: answers.put(executor.add_lora(second)), daemon=True).start()
    assert answers.get(timeout=20)
    for _ in range(20):
        server.step()
    assert not server.scheduler.requests
    assert not store.leased
