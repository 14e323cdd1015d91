"""How an engine core reaches its workers, and the stores of workers that it waits for."""

import time
from concurrent.futures import Future

import pytest

from tests.engine.parties import lora, pack_info
from tests.store.fake_reader import FakeReader
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.engine.workers import LinkedWorkers, WaitingStore, WaitingWorkers
from vllm_multilora.integration.fill_link import Filled, FillFailed
from vllm_multilora.integration.orders import Fill
from vllm_multilora.integration.worker import calls, own_store
from vllm_multilora.integration.worker.manager import MultiLoRAWorkerManager
from vllm_multilora.integration.worker.own_store import OwnStore
from vllm_multilora.store.channel import ChannelClosedError
from vllm_multilora.store.client import StoreClient
from vllm_multilora.store.folder import FOLDER_VARIABLE
from vllm_multilora.store.launch import StoreThread
from vllm_multilora.store.messages import Evicted, Failed, Forgotten, Loaded, StoreSettings, Want

ORDER = Fill(0, lora(1), pack_info(1), slot=1)


class Stub:
    """A worker's manager."""

    def __init__(self, store: OwnStore | None = None) -> None:
        self.own_store = store
        self.begun: list = []

    @property
    def model_runner(self) -> "Stub":
        return self

    @property
    def lora_manager(self) -> "Stub":
        return self

    def begin(self, order) -> None:
        self.begun.append(order)

    def carry_out_now(self, order) -> Filled:
        self.begun.append(order)
        return Filled(order.order, 0.1)


class Reply(Future):
    """As vLLM's: it is done when somebody has read it."""

    def __init__(self, found: list) -> None:
        super().__init__()
        self._found = found

    def result(self, timeout=None):
        if not self.done():
            self.set_result(self._found)
        return super().result()


class Executor:
    """Calls what it is given for each worker."""

    def __init__(self, workers: list[Stub]) -> None:
        self.workers = workers
        self.replies: list[Reply] = []

    def collective_rpc(self, method, args=(), non_block=False):
        found = [method(worker, *args) for worker in self.workers]
        if not non_block:
            return found
        self.replies.append(Reply(found))
        return self.replies[-1]


class FakeLink:
    def poll(self, seconds):
        return [(0, Filled(0, 0.1))]


def test_linked_workers_begin_and_answer_by_themselves():
    stubs = [Stub(), Stub()]
    workers = LinkedWorkers(Executor(stubs).collective_rpc, FakeLink())
    for _ in range(5):
        workers.send([ORDER])
    assert [stub.begun for stub in stubs] == [[ORDER] * 5] * 2
    assert workers.poll() == [(0, Filled(0, 0.1))]


def test_few_replies_are_left_unread_and_nobody_waits_for_these():
    executor = Executor([Stub()])
    workers = LinkedWorkers(executor.collective_rpc, FakeLink())
    for _ in range(4):
        workers.send([ORDER])
    assert not any(reply.done() for reply in executor.replies)
    for reply in executor.replies[:3]:
        reply.result()  # by a step, in passing
    for _ in range(3):
        workers.send([ORDER])
    assert [reply.done() for reply in executor.replies] == [True] * 3 + [False] * 4
    for _ in range(20):
        workers.send([ORDER])
        assert sum(not reply.done() for reply in executor.replies) <= 4


def test_waiting_workers_answer_what_was_sent_once():
    workers = WaitingWorkers(Executor([Stub(), Stub()]).collective_rpc)
    workers.send([ORDER])
    assert workers.poll() == [(0, Filled(0, 0.1)), (1, Filled(0, 0.1))]
    assert workers.poll() == []


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Two workers with stores of their own, which are threads."""
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))

    def connect(mode, server):
        return StoreClient(StoreThread(FakeReader()), server)

    monkeypatch.setattr(own_store.StoreClient, "connect", staticmethod(connect))
    made = [
        OwnStore("thread", f"server-{rank}", rank, StoreSettings(budget_bytes=8192))
        for rank in range(2)
    ]
    yield [Stub(store) for store in made]
    for store in made:
        store._client.close()


@pytest.fixture
def store(stubs) -> WaitingStore:
    return WaitingStore(Executor(stubs).collective_rpc)


def leases(stub: Stub) -> int:
    """Leases of a worker, as its store knows them."""
    client = stub.own_store._client
    client.describe()
    while True:
        for message in client.poll(5.0):
            if hasattr(message, "clients"):
                return sum(
                    row.leases for row in message.clients if row.server == client._hello.server
                )


def test_a_want_is_answered_at_once_with_the_engines_own_numbers(store, stubs):
    ticket = store.want(Want(1, "one", "/fake/one"))
    (answer,) = store.poll()
    assert isinstance(answer, Loaded)
    assert (answer.ticket, answer.pack.pack, answer.leased) == (ticket, ticket, True)
    assert [leases(stub) for stub in stubs] == [1, 1]
    assert {stub.own_store.pack(ticket).digest for stub in stubs} == {answer.pack.digest}
    store.release(ticket)
    assert [leases(stub) for stub in stubs] == [0, 0]
    assert store.poll() == []


def test_what_is_only_checked_is_no_pack(store):
    store.want(Want(1, "one", "/fake/one", keep=False))
    (answer,) = store.poll()
    assert (answer.pack.pack, answer.leased) == (0, False)


def test_a_failure_is_an_answer(store):
    ticket = store.want(Want(1, "one", "/fake/one?fail=bad"))
    (answer,) = store.poll()
    assert isinstance(answer, Failed)
    assert (answer.ticket, "bad" in answer.message) == (ticket, True)


def test_a_failure_of_one_worker_leaves_nothing_on_lease_at_the_others(store, stubs, monkeypatch):
    def fail(want):
        return Failed(want.ticket, FailureKind.UNREADABLE, "no such disk", [])

    monkeypatch.setattr(stubs[1].own_store, "load", fail)
    store.want(Want(1, "one", "/fake/one"))
    (answer,) = store.poll()
    assert isinstance(answer, Failed)
    assert leases(stubs[0]) == 0


def test_a_want_taken_back_gives_its_lease_back(store, stubs):
    store.cancel(store.want(Want(1, "one", "/fake/one")))
    assert store.poll() == []
    assert [leases(stub) for stub in stubs] == [0, 0]


def test_a_store_that_does_not_answer_is_a_failure(store, stubs, monkeypatch):
    for stub in stubs:
        monkeypatch.setattr(stub.own_store, "_limit_s", 0.2)
    store.want(Want(1, "one", "/fake/one?hang=1"))
    (answer,) = store.poll()
    assert isinstance(answer, Failed)
    assert answer.kind is FailureKind.TIMEOUT


def test_a_store_that_hears_of_others_only_is_a_failure_in_time(stubs, monkeypatch):
    """What comes meanwhile, such as totals, does not begin the time anew."""
    own = stubs[0].own_store
    monkeypatch.setattr(own, "_limit_s", 0.3)
    poll = own._client.poll
    monkeypatch.setattr(
        own._client, "poll", lambda seconds: [*poll(min(seconds, 0.02)), Evicted(99)]
    )
    begin = time.monotonic()
    answer = own.load(Want(1, "one", "/fake/one?hang=2", ticket=1))
    assert isinstance(answer, Failed)
    assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize("heard", ["by a load", "by a withdrawal", "by a fill"])
def test_packs_of_a_store_that_was_started_again_are_gone(stubs, heard):
    own = stubs[0].own_store
    own.load(Want(1, "one", "/fake/one", ticket=1))
    assert own.pack(1) is not None
    own._client._lose(ChannelClosedError("it ended"))
    if heard == "by a load":
        answer = own.load(Want(2, "two", "/fake/two", ticket=2))
        assert isinstance(answer, Loaded)
        assert own.pack(2) is not None
    elif heard == "by a withdrawal":
        own.forget(2)
    assert own.pack(1) is None
    own.release(1)


def test_a_fill_from_a_pack_that_nobody_has_any_more_is_made_again_from_another(stubs):
    manager = MultiLoRAWorkerManager.__new__(MultiLoRAWorkerManager)
    manager.own_store, manager._orders, manager._is_warming_up = stubs[0].own_store, 0, False
    answer = manager.carry_out_now(ORDER)
    assert isinstance(answer, FillFailed)
    assert answer.is_gone


def test_a_withdrawn_adapter_is_forgotten_at_once(store):
    store.want(Want(1, "one", "/fake/one", keep=False))
    store.poll()
    store.forget(1)
    assert store.poll() == [Forgotten(1)]


def test_workers_know_what_the_engine_asks_of_them(stubs):
    assert calls.load_now(stubs[0], Want(1, "one", "/fake/one", ticket=5)).ticket == 5
    calls.release_now(stubs[0], 5)
    assert leases(stubs[0]) == 0
