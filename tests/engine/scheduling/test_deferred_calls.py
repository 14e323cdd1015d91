"""What the engine core says once a step is with its workers."""

from collections.abc import Callable
from queue import Queue
from types import SimpleNamespace

import msgspec
import pytest
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from tests.engine.executors import StartedExecutor
from tests.engine.fake_engine import FakeStore, lora, pack_info
from tests.engine.scheduling.test_scheduler import Server, config
from vllm_multilora.integration.engine import core
from vllm_multilora.integration.engine.adapter_status import REGISTER
from vllm_multilora.integration.engine.core import SERVER
from vllm_multilora.integration.engine.scheduling import scheduler
from vllm_multilora.integration.engine.scheduling.scheduler import DeferredCalls
from vllm_multilora.integration.failed_requests import AdapterRefusedError
from vllm_multilora.integration.worker_link.fill_link import LINK


def test_it_is_said_in_order_and_what_follows_from_it_too():
    deferred_calls, said = DeferredCalls(), []
    deferred_calls.say(lambda: said.append("at once"))
    deferred_calls.wait = True
    deferred_calls.say(lambda: deferred_calls.say(lambda: said.append("third")))
    deferred_calls.say(lambda: said.append("second"))
    assert said == ["at once"]
    deferred_calls.flush()
    assert said == ["at once", "second", "third"]
    deferred_calls.flush()
    assert len(said) == 3


@pytest.mark.parametrize(("kind", "waits"), [(MultiprocExecutor, True), (UniProcExecutor, False)])
def test_only_other_processes_compute_while_something_is_said(monkeypatch, kind, waits):
    executor = kind.__new__(kind)
    link = SimpleNamespace(start_waking=lambda wake: None)
    LINK.set(executor, link)
    SERVER.set(executor, "server")
    store = SimpleNamespace(say_by=lambda say, say_all: None, start_waking=lambda wake: None)
    monkeypatch.setattr(core, "_open_stores", lambda *arguments: store)
    deferred_calls = DeferredCalls()
    executor.vllm_config = None
    core._connect(
        executor, SimpleNamespace(deferred_calls=deferred_calls), lambda: None, asks_late=False
    )
    assert deferred_calls.wait is waits


class Deferred(FakeStore):
    """A store that hears what is said of requests' adapters when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[int] = []
        self.say: Callable = lambda call: call()
        self.say_all: Callable = lambda: None

    def request_load(self, load_request):
        self.say(lambda: self.heard.append(load_request.adapter))
        return super().request_load(load_request)

    def poll(self, seconds=0.0):
        if seconds:
            self.say_all()
        return super().poll(seconds)


@pytest.fixture
def server(monkeypatch) -> Server:
    monkeypatch.setattr("tests.engine.fake_engine.FakeStore", Deferred)
    monkeypatch.setattr(scheduler, "engine_recorder", lambda config: None)
    server = Server()
    deferred_calls = server.scheduler.deferred_calls
    server.engine.store.say, server.engine.store.say_all = deferred_calls.say, deferred_calls.flush
    deferred_calls.wait = True
    return server


def test_the_store_hears_of_a_request_when_the_step_is_with_the_workers(server):
    server.ask("base")
    server.ask("a", 1)
    output = server.scheduler.schedule()
    assert server.engine.store.heard == []
    server.scheduler.get_grammar_bitmask(output)
    assert server.engine.store.heard == [1]


def test_it_hears_at_the_end_of_a_step_at_the_latest(server):
    """VLLM asks for no bitmask where nothing is sampled."""
    server.ask("base")
    server.ask("a", 1)
    server.step()
    assert server.engine.store.heard == [1]


def test_a_request_whose_adapter_is_in_memory_has_its_slot_filled_in_the_next_step(server):
    """Its lease takes a moment, and a step all the longer."""
    server.engine.host(1, 7)
    server.engine.adapters.drop(1)
    server.scheduler.deferred_calls.flush()
    server.ask("base")
    server.ask("a", 1)
    server.engine.store.answers = lambda: server.engine.store.loaded(pack_info(7))
    server.scheduler.schedule()
    assert server.engine.workers.only().pack.pack == 7


@pytest.fixture
def executor(server) -> StartedExecutor:
    """The executor of an engine core in a process of its own."""
    return StartedExecutor(server.scheduler, config(2), Queue())


def test_calls_are_carried_out_and_answered_when_the_step_is_with_the_workers(server, executor):
    server.ask("base")
    server.step()
    good, bad = (executor.add_lora(lora(number)) for number in (1, 2))
    output = server.scheduler.schedule()
    assert server.engine.store.load_requests == {}
    server.scheduler.get_grammar_bitmask(output)
    assert server.engine.store.heard == [1, 2]
    one, other = list(server.engine.store.load_requests.values())
    server.engine.store.failed(other)
    server.engine.store.loaded(pack_info(1), one)
    output = server.scheduler.schedule()
    server.engine.poll()
    assert not good.done()
    assert not bad.done()
    server.scheduler.get_grammar_bitmask(output)
    assert good.result(0)
    assert "it is bad" in str(bad.exception(0))


def test_calls_are_carried_out_in_their_order(server, executor):
    server.ask("base")
    server.step()
    executor.add_lora(lora(1))
    removed = executor.remove_lora(1)
    refused = executor.pin_lora(1)
    server.step()
    server.engine.store.forgets()
    server.step()
    server.step()
    assert removed.result(0)
    assert "never added" in str(refused.exception(0))


@pytest.mark.parametrize(
    ("contents", "kind", "tokens"),
    [
        ({}, "lora", []),
        ({"dora": True}, "dora", []),
        ({"invocation_tokens": (1, 2)}, "alora", [1, 2]),
    ],
    ids=["plain", "dora", "activated"],
)
def test_a_servers_registration_is_answered_with_what_was_read(
    server, executor, contents, kind, tokens
):
    read = executor.collective_rpc(REGISTER, None, (msgspec.structs.asdict(lora(1)),))
    assert not server.scheduler.has_requests()
    server.engine.store.loaded(msgspec.structs.replace(pack_info(1, "d1"), **contents))
    server.engine.poll()
    assert not server.scheduler.has_requests()
    assert read.result(0) == {"digest": "d1", "kind": kind, "invocation": tokens}


def test_a_servers_registration_that_is_refused_is_answered_with_the_reason(server, executor):
    read = executor.collective_rpc(REGISTER, None, (msgspec.structs.asdict(lora(1)),))
    assert not server.scheduler.has_requests()
    server.engine.store.failed(next(iter(server.engine.store.load_requests.values())))
    server.engine.poll()
    assert not server.scheduler.has_requests()
    refusal = AdapterRefusedError.of_dict(1, read.result(0))
    assert "it is bad" in str(refusal)


def test_nobody_waits_for_a_step_where_none_will_come(server, executor):
    answer = executor.add_lora(lora(1))
    assert not server.scheduler.has_requests()
    assert server.engine.store.heard == [1]
    server.engine.store.loaded(pack_info(1))
    server.engine.poll()
    assert not server.scheduler.has_requests()
    assert answer.result(0)
