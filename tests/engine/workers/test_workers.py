"""How an engine core reaches its workers, and what these do with its orders."""

from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.utils import LoRAMappingType
from vllm.lora.request import LoRARequest

from tests.engine.executors import SchedulerStub, StartedExecutor
from tests.engine.fake_engine import lora, pack_info
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.integration.engine.workers.workers import LinkedWorkers
from vllm_multilora.integration.step.mapping import BatchMapping
from vllm_multilora.integration.worker import worker_calls
from vllm_multilora.integration.worker.manager import MultiLoRAWorkerManager
from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager
from vllm_multilora.integration.worker_link.fill_link import Filled, Missing
from vllm_multilora.integration.worker_link.orders import Fill

ORDER = Fill(0, lora(1), pack_info(1), slot=1)


class Stub:
    """A worker's manager."""

    def __init__(self) -> None:
        self.begun: list = []

    @property
    def model_runner(self) -> "Stub":
        return self

    @property
    def lora_manager(self) -> "Stub":
        return self

    def begin(self, order) -> None:
        self.begun.append(order)


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


@pytest.mark.parametrize("after", ["an order", "other base weights", "a sleep"])
def test_a_step_of_the_same_adapters_looks_at_their_slots_again(after):
    """As one of other adapters does."""
    slots = Slots(None, 1)
    manager = slots.worker()
    batch = {lora(1)}, LoRAMapping((1,), (1,))
    for _ in range(3):
        manager.set_active_adapters(*batch)
    assert slots.looked_at == [[1]]
    if after == "an order":
        manager.begin(ORDER)
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


def test_an_order_ends_a_warm_up_and_has_its_slot_afterwards():
    """Graphs are captured with adapters that nobody removes."""
    slots = Slots(None, None)
    manager = slots.worker()
    dummies = [LoRARequest(f"warmup_{i}", i, "/not/a/real/path") for i in (1, 2)]
    for dummy in dummies:
        manager.add_dummy_lora(dummy, 8)
    manager.set_active_adapters(set(dummies), LoRAMapping((1, 2), (1, 2)))
    assert slots.lora_index_to_id == [1, 2]
    manager.begin(ORDER)
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
