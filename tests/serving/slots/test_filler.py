"""Slots are filled on a thread of their own, from a store's memory, as orders say."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from multilora_kernels import SlotTable
from multilora_kernels.packs.pieces import REGISTERED_BYTES
from tests.adapters.checkpoints import MODULES, PREFIX, layout, weights, write
from tests.store.conftest import is_writable
from vllm_multilora.adapters.model.naming import ModuleNaming
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.worker_link.fill_link import Answer, Filled, FillFailed
from vllm_multilora.integration.worker_link.orders import Check, Fill
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.memory.mapper import SegmentMapper
from vllm_multilora.store.protocol.messages import Loaded, LoadRequest, PackInfo, StoreSettings
from vllm_multilora.store.store_launch import StoreThread

from ..allocated_slots import Setting, real_manager
from ..kinds.test_expert_adapters import SLOT, filler
from ..models.tiny_models import write_llama4_config

pytestmark = pytest.mark.serving

LIMIT_S = 10.0
SLOTS, MAX_RANK = 2, 16
SERVER = "server"


class Model:
    """Stands in for the model manager: real slots, and a note of what else is asked of it."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.lora_a = [torch.zeros(SLOTS, MAX_RANK, inputs) for _, inputs, _ in MODULES]
        self.lora_b = [torch.zeros(SLOTS, outputs, MAX_RANK) for _, _, outputs in MODULES]
        self.slot_table = SlotTable(self.lora_a, self.lora_b)
        self.lora_index_to_id: list[int | None] = [None] * SLOTS
        self.may_fill = threading.Event()
        self.may_fill.set()
        self.factors = None
        self.lora_slots = SLOTS
        self.error: Exception | None = None
        self.filled: list[int] = []

    def give_slot(self, slot: int, lora_id: int) -> None:
        self.lora_index_to_id[slot] = lora_id

    def empty_all_slots(self) -> None:
        self.lora_index_to_id[:] = [None] * SLOTS

    def fill_rest(self, slot: int, index: Any, special: Any) -> None:
        assert self.may_fill.wait(LIMIT_S)
        error, self.error = self.error, None
        if error is not None:
            raise error
        self.filled.append(slot)


class Special:
    """Stands in for `SpecialParts`: takes whatever there is, or refuses it."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def make(self, request: Any, index: Any, memory: Any, segments: Any) -> str:
        if self.error is not None:
            raise self.error
        return "special parts"


@dataclass
class Link:
    """Stands in for the way back to the engine core."""

    answers: list[Answer] = field(default_factory=list)
    reported: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def tell(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.reported.release()

    def next(self) -> Answer:
        assert self.reported.acquire(timeout=LIMIT_S)
        return self.answers.pop(0)


class Rig:
    """A filler over a model of five layers, beside a store."""

    def __init__(self, folder: Path, layouts: Sequence[Any] = (), place: int = 0) -> None:
        from vllm_multilora.integration.worker.slots.filler import SlotFiller

        self._folder = folder
        self.client = StoreClient(StoreThread(), SERVER)
        self.client.configure(layouts or [layout(max_rank=MAX_RANK)], StoreSettings())
        self.model, self.special, self.link = Model(), Special(), Link()
        self.filler = SlotFiller(self.model, self.special, self.link)  # type: ignore[arg-type]
        self.filler.open_memory(self.client.address, SERVER, place=place)

    def load(self, adapter: int, rank: int, layers: Sequence[int] = (0, 1)) -> PackInfo:
        tensors = {
            name: tensor
            for name, tensor in tensors_of(adapter, rank).items()
            if any(f"layers.{layer}." in name for layer in layers)
        }
        folder = write(self._folder / f"{adapter}", tensors, rank, alpha=2 * rank)
        self.client.request_load(LoadRequest(adapter, f"adapter {adapter}", str(folder)))
        while True:
            for message in self.client.poll(LIMIT_S):
                if isinstance(message, Loaded):
                    return message.pack
                assert "Failed" not in type(message).__name__, message

    def fill(self, order: int, slot: int, adapter: int, pack: PackInfo) -> Fill:
        return Fill(order, request(adapter), pack, slot=slot)

    def fill_now(self, order: Fill) -> Answer:
        """Has an order carried out; returns its answer."""
        self.filler.begin(order)
        return self.link.next()

    def in_slot(self, slot: int, row: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.lora_a[row][slot, :rank], self.model.lora_b[row][slot, :, :rank]


def tensors_of(adapter: int, rank: int) -> dict[str, torch.Tensor]:
    return weights({module: rank for module, _, _ in MODULES}, seed=adapter)


def request(adapter: int) -> Any:
    return SimpleNamespace(lora_int_id=adapter, lora_name=f"adapter {adapter}")


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.model.may_fill.set()
    rig.filler._thread.shutdown()
    rig.filler._memory.close()  # nothing is mapped any more when CUDA's stand-in has gone
    rig.client.close()


def assert_holds(rig: Rig, slot: int, adapter: int, rank: int) -> None:
    """A slot's weights are those of the files; B with the scaling, which is 2."""
    tensors = tensors_of(adapter, rank)
    for row, (module, _, _) in enumerate(MODULES):
        a, b = rig.in_slot(slot, row, rank)
        assert torch.equal(a, tensors[f"{PREFIX}{module}.lora_A.weight"])
        assert torch.equal(b, 2 * tensors[f"{PREFIX}{module}.lora_B.weight"])


def test_nothing_is_copied_while_the_slots_memory_is_not_there(rig: Rig) -> None:
    pack = rig.load(7, rank=4)
    rig.filler.slots_away()
    assert rig.fill_now(rig.fill(0, 1, 7, pack)) == Filled(0, None)
    rig.filler.slots_back()
    answer = rig.fill_now(rig.fill(1, 1, 7, pack))
    assert isinstance(answer, Filled)
    assert answer.seconds


def test_a_step_waits_for_its_own_slots_only(rig: Rig) -> None:
    pack = rig.load(7, rank=4)
    rig.model.may_fill.clear()
    rig.filler.begin(rig.fill(0, 1, 7, pack))
    rig.filler.await_slots([0])
    assert rig.model.filled == []
    threading.Timer(0.05, rig.model.may_fill.set).start()
    rig.filler.await_slots([1])
    assert len(rig.model.filled) == 1


@pytest.mark.parametrize("slot", range(SLOTS))
def test_an_idle_ranks_dummy_batch_waits_for_no_copy_into_a_slot(rig: Rig, slot: int) -> None:
    """All data-parallel ranks would wait with it. vLLM's second runner has adapters in it."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.worker.manager import MultiLoRAWorkerManager

    pack, mapped = rig.load(7, rank=4), []
    rig.model.may_fill.clear()
    manager = MultiLoRAWorkerManager.__new__(MultiLoRAWorkerManager)
    manager._adapter_manager, manager.filler = rig.model, rig.filler  # type: ignore[assignment]
    rig.model.set_adapter_mapping = lambda _: mapped.append(list(rig.model.lora_index_to_id))
    manager._orders, manager._missing, manager._owners = 0, frozenset(), None
    manager._warm_up_ranks, manager._is_warming_up = {}, False
    manager.begin(rig.fill(0, slot, 7, pack))
    dummies = {LoRARequest(f"warmup_{i}", i, "/not/a/real/path") for i in range(1, SLOTS + 1)}
    for dummy in dummies:
        manager.add_dummy_lora(dummy, 8)
    thread = threading.Thread(
        target=manager.set_active_adapters, args=(dummies, LoRAMapping((1,), (1,)))
    )
    thread.start()
    thread.join(LIMIT_S / 2)
    assert mapped, "it waits for a slot that it does not use"
    assert mapped[0].index(1) == 1 - slot
    assert rig.model.filled == []
    manager.remove_all_adapters()
    assert rig.model.lora_index_to_id[slot] == 7
    rig.model.may_fill.set()
    assert isinstance(rig.link.next(), Filled)


def test_orders_are_carried_out_one_after_the_other(rig: Rig) -> None:
    """The last of several orders for one slot is the one that counts."""
    packs = {adapter: rig.load(adapter, rank=4) for adapter in (7, 8)}
    for order, adapter in enumerate((7, 8, 7, 8)):
        rig.filler.begin(rig.fill(order, 0, adapter, packs[adapter]))
    rig.filler.await_all()
    assert [rig.link.next().order for _ in range(4)] == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert_holds(rig, 0, 8, rank=4)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("no room to stage it"), FailureKind.NO_MEMORY),
        (ValueError("vLLM does not take it"), FailureKind.INVALID),
        (RuntimeError("a fault of the software"), FailureKind.INTERNAL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_copy_that_fails_is_reported_and_the_next_one_is_made(
    rig: Rig, error: Exception, kind: FailureKind
) -> None:
    pack = rig.load(7, rank=4)
    rig.model.error = error
    rig.filler.begin(rig.fill(0, 0, 7, pack))
    assert rig.link.next() == FillFailed(0, kind, str(error))
    rig.filler.begin(rig.fill(1, 0, 7, pack))
    assert isinstance(rig.link.next(), Filled)
    assert_holds(rig, 0, 7, rank=4)


def test_an_order_that_cannot_be_begun_is_reported_and_the_next_one_is_carried_out(
    rig: Rig,
) -> None:
    """Raised here it would end the engine, some calls later."""
    pack = rig.load(7, rank=4)
    answer = rig.fill_now(rig.fill(0, SLOTS + 1, 7, pack))  # there is no such slot
    assert isinstance(answer, FillFailed)
    assert (answer.order, answer.kind) == (0, FailureKind.INTERNAL)
    rig.filler.begin(rig.fill(1, 0, 7, pack))
    assert isinstance(rig.link.next(), Filled)


def test_a_stage_without_layers_of_an_adapter_fills_its_slot_with_nothing(tmp_path: Path) -> None:
    """As with pipeline parallelism: the adapter is on the first stage's layers only."""
    slices = layout().slices
    stages = [
        layout(
            slices=own,
            naming=ModuleNaming(
                frozenset(each.name for each in own), others=(f"model.layers.{other}.",)
            ),
        )
        for own, other in ((slices[:3], 1), (slices[3:], 0))
    ]
    rig = Rig(tmp_path, stages, place=1)
    pack = rig.load(7, rank=4, layers=(0,))
    rig.filler.begin(rig.fill(0, 1, 7, pack))
    assert isinstance(rig.link.next(), Filled)
    assert not any(a.any() for a in rig.model.lora_a)
    rig.client.close()


def test_memory_that_is_gone_is_reported_as_such(rig: Rig) -> None:
    pack = rig.load(7, rank=4)
    # As a store that was started again knows nothing of what the one before had.
    gone = msgspec.structs.replace(pack, segments=[number + 1000 for number in pack.segments])
    rig.filler.begin(rig.fill(0, 0, 7, gone))
    answer = rig.link.next()
    assert isinstance(answer, FillFailed)
    assert answer.is_gone


def test_a_check_changes_nothing_and_says_what_vllm_says(rig: Rig) -> None:
    pack = msgspec.structs.replace(rig.load(7, rank=4), has_special=True)
    rig.filler.begin(Check(-1, request(7), pack))
    assert isinstance(rig.link.next(), Filled)
    rig.special.error = ValueError("this head has another shape")
    rig.filler.begin(Check(-2, request(7), pack))
    assert rig.link.next() == FillFailed(-2, FailureKind.INVALID, "this head has another shape")
    assert rig.model.lora_index_to_id == [None, None]
    assert not any(a.any() for a in rig.model.lora_a)


class Runtime:
    """Stands in for CUDA's: notes what is page-locked, and refuses what it is told to.

    Like CUDA's, it refuses memory that may not be written to, and keeps a thread's last error.
    """

    def __init__(self, most: int = 1 << 30) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[str] = set()
        self.most = most
        self._of_thread = threading.local()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.threads.add(threading.current_thread().name)
        code = 0
        if flags:
            code = 801  # cudaErrorNotSupported
        elif not is_writable(address):
            code = 1  # cudaErrorInvalidValue
        elif len(self.calls) >= self.most:
            code = 2  # cudaErrorMemoryAllocation
        if code:
            self._of_thread.last_error = code
        else:
            self.calls.append(("register", address, size))
        return code

    @property
    def last_error(self) -> int:
        """This thread's last CUDA error, which the launch of its next kernel would report."""
        return getattr(self._of_thread, "last_error", 0)

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unregister", address))
        return 0


def open_as_for_a_gpu(rig: Rig, monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> Any:
    """The host's memory as for a GPU; copies stay on this machine."""
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with monkeypatch.context() as patch:
        patch.setattr(rig.filler, "_device", torch.device("cuda", 0))
        rig.filler.open_memory(rig.client.address, SERVER)
    return rig.filler._memory


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_segment_is_page_locked_once_in_parts_and_released_before_it_is_unmapped(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime()
    memory = open_as_for_a_gpu(rig, monkeypatch, runtime)
    packs = {adapter: rig.load(adapter, rank=4) for adapter in (7, 8)}
    for order, adapter in enumerate((7, 8, 7)):
        assert isinstance(rig.fill_now(rig.fill(order, 0, adapter, packs[adapter])), Filled)
    mapped = {each.address: len(each._map) for each in memory._segments.values()}
    expected, calls = [], list(runtime.calls)
    for address, size in mapped.items():
        at = address
        for _, begin, part in [call for call in calls if address <= call[1] < address + size]:
            assert begin == at
            assert part <= REGISTERED_BYTES
            assert part == address + size - begin or (begin + part) % REGISTERED_BYTES == 0
            expected.append(begin)
            at += part
        assert at == address + size
    assert len(calls) == len(expected) > len(mapped)
    memory.close()
    assert runtime.calls[len(calls) :] == [("unregister", begin) for begin in expected]


def map_ahead(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> tuple[SegmentMapper, PackInfo]:
    """A filler's memory and a pack in it, whose segment was mapped as soon as it was made."""
    memory = open_as_for_a_gpu(rig, monkeypatch, runtime)
    pack = rig.load(7, rank=4)
    until(lambda: pack.segments[0] in memory._segments)
    rig.filler._thread.submit(lambda: None).result(LIMIT_S)  # the mapping before it is over
    return memory, pack


def test_a_segment_is_page_locked_when_the_store_makes_it_and_not_by_an_order(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime()
    _, pack = map_ahead(rig, monkeypatch, runtime)
    before = len(runtime.calls)
    assert before
    assert isinstance(rig.fill_now(rig.fill(0, 0, 7, pack)), Filled)
    assert len(runtime.calls) == before
    # Slots are filled there too; whoever runs the steps never waits for the driver.
    assert all(name.startswith("multilora-fill") for name in runtime.threads)


def test_segments_that_were_there_before_a_worker_are_page_locked_ahead_too(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = rig.load(7, rank=4)
    memory = open_as_for_a_gpu(rig, monkeypatch, Runtime())
    until(lambda: pack.segments[0] in memory._segments)


def test_nothing_keeps_a_filler_whose_engine_has_ended_before_its_process(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it the model and all slots would stay on the GPU."""
    runtime = Runtime()
    memory, _ = map_ahead(rig, monkeypatch, runtime)
    filler, rig.filler = weakref.ref(rig.filler), Rig(rig._folder).filler
    until(lambda: gc.collect() >= 0 and filler() is None)

    def addresses(what: str) -> set[int]:
        return {address for call, address, *_ in list(runtime.calls) if call == what}

    until(lambda: addresses("unregister") == addresses("register"))
    until(lambda: not memory._segments)


def test_memory_that_cannot_be_page_locked_whole_serves_and_what_was_is_released(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(most=1)
    memory = open_as_for_a_gpu(rig, monkeypatch, runtime)
    pack = rig.load(7, rank=4)
    assert isinstance(rig.fill_now(rig.fill(0, 0, 7, pack)), Filled)
    assert "cannot be page-locked (CUDA error 2 after" in caplog.text
    memory.close()
    (registered, released) = runtime.calls
    assert released == ("unregister", registered[1])


def test_a_segment_that_no_thread_could_page_lock_is_unmapped_like_any_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_multilora.integration.worker.slots.filler import Registered

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    registered = Registered(torch.device("cuda", 0))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            registered.add(1, 4096, 4096)
    registered.drop(1)


def test_the_kernels_that_fill_a_slot_are_not_taken_for_what_could_not_be_page_locked(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(most=0)
    open_as_for_a_gpu(rig, monkeypatch, runtime)
    errors: list[int] = []
    scatter = rig.model.slot_table.scatter

    def noting(*args: Any, **kwargs: Any) -> None:
        errors.append(runtime.last_error)
        scatter(*args, **kwargs)

    monkeypatch.setattr(rig.model.slot_table, "scatter", noting)
    assert isinstance(rig.fill_now(rig.fill(0, 0, 7, rig.load(7, rank=4))), Filled)
    assert runtime.threads
    assert errors == [0]


def test_rows_are_where_vllm_loads_the_models(tmp_path: Path) -> None:
    """Llama 4's queries and keys are reordered for rotary embeddings: with their adapters, too."""
    from vllm_multilora.integration.offline.model_without_weights import one_worker

    folder = write_llama4_config(tmp_path / "model")
    attention, rank = "model.layers.1.self_attn", 4
    generator = torch.Generator().manual_seed(0)
    tensors, sums = {}, {}
    for kind, outputs in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)):
        a, b = (torch.randn(s, generator=generator) for s in ((rank, 128), (outputs, rank)))
        a, b = a.bfloat16(), b.bfloat16()
        tensors |= {
            f"{PREFIX}{attention}.{kind}.lora_{x}.weight": t
            for x, t in zip("AB", (a, b), strict=True)
        }
        sums[kind] = b.float() @ a.float()
    adapter = write(tmp_path / "adapter", tensors, rank, alpha=rank)
    setting = Setting(max_loras=2, max_lora_rank=8, dora=True)
    with real_manager(folder, setting, one_worker) as manager, filler(manager) as fill:
        no_dora = {name.rpartition(".")[2] for name in manager.layout.no_dora}
        assert no_dora == {"q_proj", "k_proj"}  # magnitudes would be those of other rows
        assert isinstance(fill(adapter), Filled)
        for host, device in manager._reordered._distinct:
            assert not torch.equal(device.fill_(0), host)
        manager.forget_contents()  # a sleep has taken the memory, and the slot is filled anew
        assert isinstance(fill(adapter), Filled)
        layer = manager.modules[f"{attention}.qkv_proj"]
        for kind, a, b in zip(sums, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            name = f"{attention}.{kind}.weight"
            _, loaded = manager.model.permute_qk_weight_for_rotary(name, sums[kind])
            assert torch.equal(loaded, sums[kind]) == (kind == "v_proj")
            torch.testing.assert_close(b[SLOT, 0].float() @ a[SLOT, 0].float(), loaded)
