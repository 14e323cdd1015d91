"""Looks into the adapter caches of an engine's workers."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_multilora.cache import CacheEvents, Tier

if TYPE_CHECKING:
    from vllm import LLM


class Recorder(CacheEvents):
    """Keeps the cache's events in their order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def loaded(self, adapter_id: int, size: int) -> None:
        self.events.append(("loaded", adapter_id, size))

    def activated(self, adapter_id: int, slot: int, size: int) -> None:
        self.events.append(("activated", adapter_id, slot))

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        self.events.append(("evicted", adapter_id, tier.value))


@dataclass(frozen=True)
class CacheView:
    """One worker's cache at a moment.

    Attributes:
        slots: The adapter in each slot.
        model_slots: The same, as the model's layers and kernels see it.
        host: Adapters with a host copy.
        host_bytes: Bytes of these copies, as the cache counts them.
        buffer_bytes: The same, counted over the tensors themselves.
        events: What has happened since the last look.
    """

    slots: tuple[int | None, ...]
    model_slots: tuple[int | None, ...]
    host: tuple[int, ...]
    host_bytes: int
    buffer_bytes: int
    events: tuple[tuple[Any, ...], ...]

    def adapters(self, event: str) -> list[int]:
        """The adapters that an event has happened to, in order."""
        return [adapter_id for kind, adapter_id, _ in self.events if kind == event]

    def counts(self) -> Counter[str]:
        """How often each event has happened."""
        return Counter(kind for kind, *_ in self.events)


def _start_recording(worker: Any) -> None:
    manager = worker.model_runner.lora_manager
    manager.remove_all_adapters()
    manager.tiers.cache._events = recorder = Recorder()
    manager.tiers.cache._look_ups._events = recorder


def _look(worker: Any) -> CacheView:
    manager = worker.model_runner.lora_manager
    cache = manager.tiers.cache
    recorder = cache._events
    events, recorder.events = tuple(recorder.events), []
    return CacheView(
        slots=cache.slots,
        model_slots=tuple(manager._adapter_manager.lora_index_to_id),
        host=cache.cpu_adapters,
        host_bytes=cache.cpu_bytes,
        buffer_bytes=sum(adapter.nbytes for adapter in manager.tiers.host.values()),
        events=events,
    )


def _lose_slots(worker: Any) -> None:
    manager = worker.model_runner.lora_manager
    for module in manager._adapter_manager.modules.values():
        for stacked in (*module.lora_a_stacked, *module.lora_b_stacked):
            stacked.fill_(float("nan"))
    manager.slots_lost()


class CacheProbe:
    """Watches every worker's cache of an engine from now on; starts from an empty cache."""

    def __init__(self, llm: "LLM") -> None:
        self._llm = llm
        self._call(_start_recording)

    def _call(self, function: Callable[[Any], Any]) -> list[Any]:
        return self._llm.collective_rpc(function, timeout=60)

    def look(self) -> list[CacheView]:
        """Each rank's view, and forgets the events so far."""
        return self._call(_look)

    def look_at_one(self) -> CacheView:
        """The view of an engine with one worker."""
        (view,) = self.look()
        return view

    def lose_slots(self) -> None:
        """Overwrites all slots and tells the workers that they were lost, as sleep mode does."""
        self._call(_lose_slots)
