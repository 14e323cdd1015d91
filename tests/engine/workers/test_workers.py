"""How an engine core reaches its workers, and the stores of workers that it waits for."""

import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.utils import LoRAMappingType
from vllm.lora.request import LoRARequest

from tests.engine.executors import SchedulerStub, StartedExecutor
from tests.engine.fake_engine import lora, pack_info
from tests.store.fake_reader import FakeReader
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.engine.workers.workers import (
    LinkedWorkers,
    WaitingStore,
    WaitingWorkers,
)
from vllm_multilora.integration.step.mapping import BatchMapping
from vllm_multilora.integration.worker import worker_calls
from vllm_multilora.integration.worker.manager import MultiLoRAWorkerManager
from vllm_multilora.integration.worker.slots import own_store
from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager
from vllm_multilora.integration.worker.slots.own_store import OwnStore
from vllm_multilora.integration.worker_link.fill_link import Filled, FillFailed, Missing
from vllm_multilora.integration.worker_link.orders import Fill
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.channel import ChannelClosedError
from vllm_multilora.store.protocol.messages import (
    Evicted,
    Failed,
    Forgotten,
    Loaded,
    LoadRequest,
    StoreSettings,
)
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE
from vllm_multilora.store.store_launch import StoreThread

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


def test_a_load_request_is_answered_at_once_with_the_engines_own_numbers(store, stubs):
    ticket = store.request_load(LoadRequest(1, "one", "/fake/one"))
    (answer,) = store.poll()
    assert isinstance(answer, Loaded)
    assert (answer.ticket, answer.pack.pack, answer.leased) == (ticket, ticket, True)
    assert [leases(stub) for stub in stubs] == [1, 1]
    assert {stub.own_store.pack(ticket).digest for stub in stubs} == {answer.pack.digest}
    store.release(ticket)
    assert [leases(stub) for stub in stubs] == [0, 0]
    assert store.poll() == []


def test_what_is_only_checked_is_no_pack(store):
    store.request_load(LoadRequest(1, "one", "/fake/one", keep=False))
    (answer,) = store.poll()
    assert (answer.pack.pack, answer.leased) == (0, False)


def test_a_failure_is_an_answer(store):
    ticket = store.request_load(LoadRequest(1, "one", "/fake/one?fail=bad"))
    (answer,) = store.poll()
    assert isinstance(answer, Failed)
    assert (answer.ticket, "bad" in answer.message) == (ticket, True)


def test_a_failure_of_one_worker_leaves_nothing_on_lease_at_the_others(store, stubs, monkeypatch):
    def fail(load_request):
        return Failed(load_request.ticket, FailureKind.UNREADABLE, "no such disk", [])

    monkeypatch.setattr(stubs[1].own_store, "load", fail)
    store.request_load(LoadRequest(1, "one", "/fake/one"))
    (answer,) = store.poll()
    assert isinstance(answer, Failed)
    assert leases(stubs[0]) == 0


def test_a_load_request_taken_back_gives_its_lease_back(store, stubs):
    store.cancel(store.request_load(LoadRequest(1, "one", "/fake/one")))
    assert store.poll() == []
    assert [leases(stub) for stub in stubs] == [0, 0]


def test_a_store_that_does_not_answer_is_a_failure(store, stubs, monkeypatch):
    for stub in stubs:
        monkeypatch.setattr(stub.own_store, "_limit_s", 0.2)
    store.request_load(LoadRequest(1, "one", "/fake/one?hang=1"))
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
    answer = own.load(LoadRequest(1, "one", "/fake/one?hang=2", ticket=1))
    assert isinstance(answer, Failed)
    assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize("heard", ["by a load", "by a withdrawal", "by a fill"])
def test_packs_of_a_store_that_was_started_again_are_gone(stubs, heard):
    own = stubs[0].own_store
    own.load(LoadRequest(1, "one", "/fake/one", ticket=1))
    assert own.pack(1) is not None
    own._client._lose(ChannelClosedError("it ended"))
    if heard == "by a load":
        answer = own.load(LoadRequest(2, "two", "/fake/two", ticket=2))
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


class Slots:
    """Stands in for the model manager and the filler of a worker, and notes what they are told."""

    def __init__(self, *owners: int | None) -> None:
        self.lora_index_to_id = list(owners)
        self.lora_slots = len(owners)
        self.mapped: list = []
        self.reported: list = []
        self.looked_at: list[list[int]] = []
        self.factors = self.link = self

    def worker(self) -> MultiLoRAWorkerManager:
        manager = MultiLoRAWorkerManager.__new__(MultiLoRAWorkerManager)
        manager._adapter_manager = manager.filler = self  # type: ignore[assignment]
        manager._step, manager._missing, manager._owners = {}, frozenset(), None
        manager._orders = manager._step_orders = 0
        manager._warm_up_ranks, manager._is_warming_up = {}, False
        return manager

    def set_adapter_mapping(self, mapping) -> None:
        self.mapped.append((mapping.index_mapping, mapping.prompt_mapping))

    def tell(self, answer) -> None:
        self.reported.append(answer)

    def await_slots(self, slots) -> None:
        self.looked_at.append(slots)

    def is_filling(self, slot) -> bool:
        return False

    def begin(self, order) -> None:
        self.lora_index_to_id[order.slot] = order.request.lora_int_id

    def fill_now(self, order) -> None:
        self.begin(order)

    def fill_with_dummy(self, slot, lora_id, rank) -> None:
        self.lora_index_to_id[slot] = lora_id

    def empty_all_slots(self) -> None:
        self.lora_index_to_id[:] = [None] * self.lora_slots

    forget_contents = empty_all_slots

    def nothing(self, *slots) -> None:
        pass

    finish = weights_changed = await_all = slots_back = nothing


def test_a_step_with_adapters_when_nobody_orders_slots_fails():
    """The base model alone would answer, in an engine with another executor."""
    slots = Slots(None, None)
    slots.link = None
    with pytest.raises(MultiLoRAError, match=r"Executor\.get_class"):
        slots.worker().set_active_adapters({lora(1)}, LoRAMapping((1,), (1,)))
    assert slots.mapped == []


@pytest.mark.parametrize("described", ["by the batch", "by requests", "by rows"])
def test_rows_of_an_adapter_that_is_in_no_slot_are_computed_without_it_until_it_is(described):
    """The engine core is told each time, and throws their tokens away."""
    slots = Slots(7, None)
    manager = slots.worker()
    requests, language = {8: lora(8), 7: lora(7)}, LoRAMappingType.LANGUAGE
    ids, tokens, sampled = np.array([8, 7, 0]), np.array([2, 2, 1]), np.array([2, 1, 1])
    inactive = np.array([0, 1, 0])  # of adapter 7, which is activated by a request's second token
    batch = SimpleNamespace(
        lora_id_to_lora_request=requests, request_lora_mapping=ids, num_reqs=len(ids)
    )

    def step():
        mapping = BatchMapping(ids, tokens, sampled, language, inactive)
        if described == "by the batch":
            manager.activate_batch(batch, tokens, sampled, language, inactive)
        elif described == "by requests":
            manager.set_active_adapters(set(requests.values()), LoRAMapping((mapping,), ()))
        else:
            rows = LoRAMapping(mapping.index_mapping, mapping.prompt_mapping)
            manager.set_active_adapters(set(requests.values()), rows)
        return slots.mapped[-1]

    for count in (1, 2):
        assert step() == ((0, 0, 0, 7, 0), (0, 0, 7, 0))
        assert slots.reported == [Missing(8)] * count
    slots.lora_index_to_id[1] = 8
    assert step() == ((8, 8, 0, 7, 0), (8, 8, 7, 0))
    assert len(slots.reported) == 2


@pytest.mark.parametrize(
    "after", ["an order", "an order that is waited for", "other base weights", "a sleep"]
)
def test_a_step_of_the_same_adapters_looks_at_their_slots_again(after):
    """As one of other adapters does."""
    slots = Slots(None, 1)
    manager = slots.worker()
    manager.own_store = SimpleNamespace(pack=pack_info)
    batch = {lora(1)}, LoRAMapping((1,), (1,))
    for _ in range(3):
        manager.set_active_adapters(*batch)
    assert slots.looked_at == [[1]]
    if after == "an order":
        manager.begin(ORDER)
    elif after == "an order that is waited for":
        manager.carry_out_now(ORDER)
    elif after == "other base weights":
        manager.remove_all_adapters()
    else:
        manager.slots_lost()
    manager.set_active_adapters(*batch)
    assert len(slots.looked_at) == 2
    assert slots.reported == ([Missing(1)] if after == "a sleep" else [])
    manager.set_active_adapters({lora(2)}, LoRAMapping((2,), (2,)))
    assert len(slots.looked_at) == 3
    assert Missing(2) in slots.reported


@pytest.mark.parametrize("waits", [True, False], ids=["waited-for", "beside-steps"])
def test_an_order_ends_a_warm_up_and_has_its_slot_afterwards(waits):
    """Graphs are captured with adapters that nobody removes."""
    slots = Slots(None, None)
    manager = slots.worker()
    manager.own_store = SimpleNamespace(pack=pack_info)
    dummies = [LoRARequest(f"warmup_{i}", i, "/not/a/real/path") for i in (1, 2)]
    for dummy in dummies:
        manager.add_dummy_lora(dummy, 8)
    manager.set_active_adapters(set(dummies), LoRAMapping((1, 2), (1, 2)))
    assert slots.lora_index_to_id == [1, 2]
    (manager.carry_out_now if waits else manager.begin)(ORDER)
    manager.set_active_adapters({lora(1)}, LoRAMapping((1,), (1,)))
    assert slots.lora_index_to_id == [None, 1]
    assert slots.reported == []


def test_slots_are_whose_they_were_after_each_batch_of_an_idle_rank():
    slots = Slots(None, None)
    manager = slots.worker()
    manager.begin(ORDER)
    dummy = LoRARequest("warmup_1", 1, "/not/a/real/path")
    for owners in ([8, 9], [9, 8]):
        slots.lora_index_to_id[:] = owners
        manager.add_dummy_lora(dummy, 8)
        manager.set_active_adapters({dummy}, LoRAMapping((1,), (1,)))
        assert slots.lora_index_to_id == [1, None]
        manager.remove_all_adapters()
        assert slots.lora_index_to_id == owners


def test_an_adapter_has_its_newest_slot_alone():
    model = MultiLoRAModelManager.__new__(MultiLoRAModelManager)
    model.lora_index_to_id = [5, None, 7]
    model.give_slot(1, 7)
    assert model.lora_index_to_id == [5, 7, None]


@pytest.mark.parametrize(
    ("tags", "are_lost"),
    [(None, True), (["weights"], True), (["kv_cache", "weights"], True), (["kv_cache"], False)],
    ids=str,
)
def test_slots_are_there_again_with_the_models_weights_and_empty(tags, are_lost):
    """The engine core and its workers say so alike, after vLLM has woken up."""
    lost: list[bool] = []
    adapters = SimpleNamespace(slots_lost=lambda: lost.append(True))
    executor = StartedExecutor(SchedulerStub(adapters), None)
    executor.collective_rpc("wake_up", kwargs={"tags": tags})
    assert executor.called == ["wake_up", worker_calls.slots_lost][: 1 + are_lost]
    assert lost == [True] * are_lost


def test_a_worker_copies_nothing_into_slots_before_it_sleeps():
    executor = StartedExecutor(SchedulerStub(), None)
    executor.collective_rpc("sleep", kwargs={"level": 1})
    assert executor.called == [worker_calls.slots_away, "sleep"]


def test_a_withdrawn_adapter_is_forgotten_at_once(store):
    store.request_load(LoadRequest(1, "one", "/fake/one", keep=False))
    store.poll()
    store.forget(1)
    assert store.poll() == [Forgotten(1)]


def test_workers_know_what_the_engine_asks_of_them(stubs):
    assert worker_calls.load_now(stubs[0], LoadRequest(1, "one", "/fake/one", ticket=5)).ticket == 5
    worker_calls.release_now(stubs[0], 5)
    assert leases(stubs[0]) == 0
