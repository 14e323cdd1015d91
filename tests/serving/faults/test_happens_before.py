"""Steps, graph replays, plans, slot copies, sleep and wake: no access without an order to the last.

The classes are the real ones; streams, events and the other thread are `happens_before`'s, and a
copy or a kernel is the note of what it reads and writes. What each wait is for is seen by leaving
it out.
"""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from multilora_kernels import BatchPlan, PlanLayout, SlotIndex, SlotTable
from multilora_kernels.batch.staging import StagingRing
from multilora_kernels.packs import device_staging
from vllm_multilora.integration.worker_link.fill_link import Answer, Filled
from vllm_multilora.integration.worker_link.orders import Fill

from .happens_before import Event, OtherThread, Stream, World

pytestmark = pytest.mark.serving

SLOTS, RANK, WIDTH = 4, 16, 64


class Ring(StagingRing):
    """A staging ring whose accesses are noted."""

    def __init__(self, world: World, name: str, target: torch.Tensor) -> None:
        super().__init__(target)
        self.world, self.name = world, name

    def open(self) -> Any:
        values = super().open()
        self.world.on_host(f"{self.name} is written", writes=(f"{self.name} buffer {self._turn}",))
        return values

    def send(self, count: int) -> None:
        # Before the copy itself, behind which its event is recorded.
        self.world.on_stream(
            f"{self.name} is sent",
            reads=(f"{self.name} buffer {self._turn}",),
            writes=(self.name,),
        )
        super().send(count)


class Rig:
    """A worker's copying side, and steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # vLLM looks at PyTorch's streams when it is imported.
        from vllm_multilora.integration.step.staged_rows import SlotColumns
        from vllm_multilora.integration.worker import manager as worker_manager
        from vllm_multilora.integration.worker import worker_calls
        from vllm_multilora.integration.worker.slots.filler import SlotFiller

        self._manager, self._calls = worker_manager, worker_calls
        self.world = world = World()
        self.slot = 0
        self.blocking: list[bool] = []  # of each event that was made
        monkeypatch.setattr(torch.cuda, "current_stream", world.current_stream)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(world))
        monkeypatch.setattr(torch.cuda, "stream", world.on)
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        monkeypatch.setattr(torch.accelerator, "synchronize", world.synchronize)
        monkeypatch.setattr("multilora_kernels.batch.staging.copy_event", lambda _: world.event())
        self.plan = BatchPlan(PlanLayout(64, SLOTS, 32), "meta")
        self.plan._staging = Ring(world, "plan", self.plan.buffer)
        weights = torch.zeros(SLOTS, RANK, WIDTH), torch.zeros(SLOTS, WIDTH, RANK)
        self.table = SlotTable(*([each] for each in weights), staging_bytes=1 << 18)
        self.staging = self.table._device_staging()
        self.staging._used = [world.event() for _ in range(2)]
        monkeypatch.setattr("multilora_kernels.triton.spread.scatter_launch", self._scatter_launch)
        monkeypatch.setattr(device_staging, "host_bytes", self._host_bytes)
        ranks = torch.zeros(1, SLOTS, dtype=torch.int32)
        self.columns = SlotColumns([ranks])
        rows = self.columns._columns
        rows._staging = Ring(world, "ranks column", rows.buffer)
        manager: Any = SimpleNamespace(
            device=torch.device("cuda", 0), factors=None, give_slot=lambda *_: None
        )
        self.filler = SlotFiller(manager, None, None)  # type: ignore[arg-type]
        self.filler._thread = OtherThread(world)  # type: ignore[assignment]
        # The other thread's work runs on this one, which keeps its own priority.
        monkeypatch.setattr("vllm_multilora.integration.worker.slots.filler.yield_processor", bool)
        monkeypatch.setattr(self.filler, "_fill_or_check", self._fill)
        self.memory = np.zeros(8 * RANK * WIDTH, np.float32)

    def _event(self, *, blocking: bool = False) -> Event:
        self.blocking.append(blocking)
        return self.world.event()

    def _scatter_launch(self, half: torch.Tensor, *_: Any) -> Any:
        turn = [h.data_ptr() for h in self.staging._halves].index(half.data_ptr())
        # The group's way to the device, all of it on this stream, and its kernel.
        table, staged = f"host table {turn}", f"staging {turn}"
        self.world.on_host("a group's table is written", writes=(table,))
        self.world.on_stream("a group is staged", reads=(table, "pack"), writes=(staged,))

        def run() -> None:
            self.world.on_stream(
                "a group is spread", reads=(staged,), writes=(f"slot {self.slot}",)
            )

        return SimpleNamespace(run=run)

    def _host_bytes(self, address: int, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def _fill(self, order: Fill, known: Any) -> None:
        self.slot = order.slot
        ranks, at = np.full(1, RANK, np.int32), np.full(1, self.memory.ctypes.data, np.int64)
        index = SlotIndex(np.zeros(1, np.int32), ranks, ranks, at, at)
        for group in self.table.pieces(order.slot, index, most_bytes=2048):
            self.table.copy(group, backend="triton")
        self.columns.write(order.slot, ranks)
        self.world.on_stream(
            "ranks are written", reads=("ranks column",), writes=(f"ranks {order.slot}",)
        )

    def begin(self, slot: int) -> Future[Answer]:
        """An order to fill a slot; the result is what the engine core is answered."""
        request: Any = SimpleNamespace(lora_int_id=1, lora_name="an adapter")
        return self.filler._submit(Fill(0, request, None, slot=slot))  # type: ignore[arg-type]

    def step(self, *slots: int) -> None:
        """A step of 128 layers, as far as order goes: eager or a graph's replay."""
        self.filler.await_slots(slots)
        self.plan.update(np.array(slots))
        memory = [each for slot in slots for each in (f"slot {slot}", f"ranks {slot}")]
        self.world.on_stream("a step's kernels", reads=("plan", *memory))

    def sleep(self) -> None:
        self._calls.slots_away(self._worker)
        self._unmap()

    def wake(self) -> None:
        self._calls.slots_lost(self._worker)

    @property
    def _worker(self) -> Any:
        manager = object.__new__(self._manager.MultiLoRAWorkerManager)
        manager.filler, manager._orders = self.filler, 0
        manager._adapter_manager = SimpleNamespace(forget_contents=self.world.synchronize)
        return SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager))

    def _unmap(self) -> None:
        self.world.clock("steps")  # vLLM waits for its own work alone
        steps = Event(self.world, dict(self.world.clock("steps")))
        steps.synchronize()
        slots = [each for slot in range(SLOTS) for each in (f"slot {slot}", f"ranks {slot}")]
        self.world.on_host("memory is taken away", writes=("plan", "ranks column", *slots))


@pytest.fixture
def rig(monkeypatch) -> Rig:
    return Rig(monkeypatch)


def serve(rig: Rig) -> None:
    """Steps, with slots filled beside and between them, and filled again after they were used."""
    rig.begin(0).result()
    for _ in range(6):
        rig.step(0)
        filling = rig.begin(1)
        rig.step(0)
        rig.step(0)
        filling.result()
        rig.step(0, 1)


def fill_and_step_at_once(rig: Rig) -> None:
    """A step comes with a slot whose answer nobody has waited for."""
    for slot in (0, 1, 0, 2):
        rig.begin(slot)
        rig.step(slot)


def sleep_and_wake(rig: Rig) -> None:
    """Memory goes while a slot is being filled, comes back, and slots are filled anew."""
    for _ in range(2):
        rig.begin(0)
        rig.step(0)
        rig.begin(1)
        rig.sleep()
        rig.wake()
        rig.begin(1).result()
        rig.step(1)


LIVES = {each.__name__: each for each in (serve, fill_and_step_at_once, sleep_and_wake)}


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
def test_every_access_is_ordered(rig, life):
    life(rig)
    assert rig.world.races == set()


def test_who_fills_slots_leaves_the_processor_to_others_while_it_waits(rig):
    serve(rig)
    assert rig.blocking == [True]


def test_while_memory_is_away_no_order_touches_it(rig):
    """One that comes with a pin, say. The engine core has every slot filled anew after that."""
    rig.begin(0).result()
    rig.sleep()
    before = len(rig.world.accesses("slot 1"))
    assert isinstance(rig.begin(1).result(), Filled)
    assert len(rig.world.accesses("slot 1")) == before
    rig.wake()
    rig.begin(1).result()
    assert len(rig.world.accesses("slot 1")) > before


def no_wait_for_a_host_buffer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.plan._staging, "_copied", [None] * 3)


def no_wait_for_a_staging_half(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.staging._used = []


def no_wait_for_earlier_steps(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "wait_event", lambda stream, event: None)


def no_wait_for_the_copy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stream.record_event

    def record_event(stream: Stream, own: Event | None = None) -> Event:
        event = original(stream, own)
        return Event(rig.world, {}) if stream.name == "copies" else event

    monkeypatch.setattr(Stream, "record_event", record_event)


def no_wait_for_a_steps_slots(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.filler, "await_slots", lambda slots: None)


def no_wait_before_sleep(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.filler, "await_all", lambda: None)


@pytest.mark.parametrize(
    ("leave_out", "life", "memory"),
    [
        (no_wait_for_a_host_buffer, serve, "plan buffer"),
        (no_wait_for_a_staging_half, serve, "host table"),
        (no_wait_for_earlier_steps, serve, "slot"),
        (no_wait_for_the_copy, serve, "slot"),
        (no_wait_for_a_steps_slots, fill_and_step_at_once, "slot"),
        (no_wait_before_sleep, sleep_and_wake, "slot"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_without_a_wait_something_is_not_ordered(rig, monkeypatch, leave_out, life, memory):
    leave_out(rig, monkeypatch)
    life(rig)
    assert any(race[0].startswith(memory) for race in rig.world.races), rig.world.races
