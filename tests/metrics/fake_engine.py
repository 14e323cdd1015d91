"""Real slots and host memory whose events become metrics, without engines or files."""

from pathlib import Path

from vllm_multilora.metrics.adapter_metrics import AdapterMetrics
from vllm_multilora.slots.adapter_usage import AdapterUsage
from vllm_multilora.slots.assignment import SlotAssignment
from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.events import Tier
from vllm_multilora.slots.policies.lru import LruPolicy
from vllm_multilora.slots.simulation.host_tier import HostTier
from vllm_multilora.states import AdapterState

from .readings import recorder

MIB = 1 << 20


class EngineWithMetrics:
    """Two slots and room for three adapters, whose names are `a`, `b`, ... by their numbers."""

    def __init__(self, folder: Path, *, most: int = 10) -> None:
        self.names: dict[int, str] = {number: chr(96 + number) for number in range(1, 20)}
        self.usage = AdapterUsage()
        self.now = 0.0
        self.recorder = recorder(folder, most=most, clock=lambda: self.now)
        self.metrics = AdapterMetrics(
            self.recorder, self.names.get, self.usage.of, slots=2, max_rank=64
        )
        self.budget = CpuBudget(adapters=3, bytes=100 * MIB)
        self.host = HostTier(LruPolicy(), self.budget)
        self.slots = SlotAssignment(2, LruPolicy(), self.metrics)
        self._settle()

    def load(self, number: int, *, rank: int = 8, on_demand: bool = False) -> None:
        size = rank * MIB
        for victim in self.host.take(number, size) or ():
            self.metrics.evicted(Tier.CPU, victim)
            if self.slots.slot_of(victim) is None:
                self.metrics.moved(victim, AdapterState.ABSENT)
        self.usage.read(number, rank, size)
        self.metrics.known(self.names[number])
        self.metrics.read(self.names[number], 0.02)
        self.metrics.moved(number, AdapterState.HOST)
        if on_demand:
            self.slots.read_on_demand(number)
        self._settle()

    def step(self, *numbers: int) -> None:
        """Runs a batch for two steps."""
        batch = frozenset(numbers)
        self.host.used(batch)
        for _ in range(2):
            self.slots.running(batch & set(self.slots.contents))
            for number in numbers:
                before = self.slots.contents
                if (order := self.slots.assign(number, pack=number)) is not None:
                    self.slots.filled(order.order)
                    self.metrics.copied(self.names[number], 0.005)
                    self.metrics.moved(number, AdapterState.SLOT)
                    if (displaced := before[order.slot]) not in (None, number):
                        self._leave(displaced)
            self.slots.running(batch)
        self.metrics.step(len(numbers))
        self._settle()

    def lose_slots(self) -> None:
        lost = [number for number in self.slots.contents if number is not None]
        self.slots.clear_all()
        for number in lost:
            self._leave(number)
        self._settle()

    def unload(self, number: int) -> None:
        self.slots.clear(number)
        self.host.drop(number)
        self.metrics.forget(number)
        self._settle()

    def pin(self, number: int) -> None:
        self.slots.pins.pin(number)
        self.metrics.pinned(self.slots.pins.adapters)

    def _leave(self, number: int) -> None:
        is_kept = number in self.host
        self.metrics.moved(number, AdapterState.HOST if is_kept else AdapterState.ABSENT)

    def _settle(self) -> None:
        self.metrics.contents(self.slots.contents)
        self.metrics.host_memory(
            len(self.host),
            self.host.bytes,
            adapters_limit=self.budget.adapters,
            bytes_limit=self.budget.bytes,
        )
