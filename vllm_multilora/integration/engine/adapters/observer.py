"""Observes what happens to an engine's adapters, for metrics and for those who ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_multilora.failures import LoadFailure
from vllm_multilora.integration.blends import label_of
from vllm_multilora.metrics.adapter_metrics import AdapterMetrics
from vllm_multilora.metrics.recorder import Recorder
from vllm_multilora.metrics.request_metrics import RequestMetrics
from vllm_multilora.slots.adapter_usage import AdapterUsage
from vllm_multilora.slots.events import SlotEvents, Tier
from vllm_multilora.store.protocol.messages import Loaded, Totals

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.states import AdapterState


class AdapterObserver(SlotEvents):
    """Told by `EngineAdapters` and its slots; changes nothing."""

    def __init__(
        self,
        recorder: Recorder | None,
        requests: RequestMetrics | None,
        *,
        slots: int,
        max_rank: int,
    ) -> None:
        self.usage = AdapterUsage()
        self.host_memory: Totals | None = None
        self.kernels: list[dict[str, str]] = []
        self._requests = requests
        self._names: dict[int, str] = {}
        self._metrics: AdapterMetrics | None = None
        if recorder is not None:
            self._metrics = AdapterMetrics(
                recorder, self._names.get, self.usage.of, slots=slots, max_rank=max_rank
            )
        self._changed: set[int] = set()

    def serves_with(self, kernels: list[dict[str, str]]) -> None:
        """Takes what a worker says of its kernels; see `kernel_rows`."""
        self.kernels = kernels
        if self._metrics is not None:
            self._metrics.kernels(kernels)

    def known(self, request: LoRARequest) -> None:
        self._names[request.lora_int_id] = label_of(request)
        self._changed.add(request.lora_int_id)

    def loaded(self, request: LoRARequest, message: Loaded) -> None:
        if self._metrics is not None:
            self._metrics.known(label_of(request))
        note = self.usage.read if message.was_read else self.usage.found
        note(request.lora_int_id, message.pack.rank, message.pack.nbytes)
        if message.was_read and self._metrics is not None:
            self._metrics.loaded("disk", label_of(request), message.seconds)
        self._changed.add(request.lora_int_id)

    def arrived(self, adapter_id: int) -> None:
        """An adapter can be had: nobody waits for its files any more."""
        if self._requests is not None:
            self._requests.settled(adapter_id)
        self._changed.add(adapter_id)

    def failed(self, request: LoRARequest, failure: LoadFailure) -> None:
        """An adapter could not be had."""
        self.usage.failed(request.lora_int_id, failure.message)
        if self._metrics is not None:
            self._metrics.failed(failure.kind)
        self.arrived(request.lora_int_id)

    def quarantined(self, adapters: dict[int, LoadFailure]) -> dict[int, LoadFailure]:
        """Adapters were taken out of service; returns them."""
        if self._metrics is not None:
            for failure in adapters.values():
                self._metrics.failed(failure.kind)
        return adapters

    def copied(self, request: LoRARequest, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.loaded("cpu", label_of(request), seconds)

    def hit(self, tier: Tier, adapter_id: int) -> None:
        self.usage.hit(tier, adapter_id)
        if self._metrics is not None:
            self._metrics.hit(tier, adapter_id)

    def miss(self, tier: Tier, adapter_id: int) -> None:
        if self._metrics is not None:
            self._metrics.miss(tier, adapter_id)

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        if self._metrics is not None:
            self._metrics.evicted(tier, adapter_id)
        self._changed.add(adapter_id)

    def assigned(self, adapter_id: int, slot: int) -> None:
        if self._metrics is not None:
            self._metrics.assigned(adapter_id, slot)
        self._changed.add(adapter_id)

    def filled(self, adapter_id: int, slot: int) -> None:
        self._changed.add(adapter_id)

    def left(self, adapter_id: int, slot: int) -> None:
        self._changed.add(adapter_id)

    def step(self, adapters: frozenset[int]) -> None:
        self.usage.step(adapters)
        if self._metrics is not None:
            self._metrics.step(len(adapters))

    def totals(self, totals: Totals) -> None:
        self.host_memory = totals
        if self._metrics is not None:
            self._metrics.host_memory(
                totals.adapters,
                totals.bytes,
                adapters_limit=totals.adapters_limit,
                bytes_limit=totals.bytes_limit,
            )

    def pinned(self, adapters: frozenset[int]) -> None:
        if self._metrics is not None:
            self._metrics.pinned(adapters)

    def forgotten(self, request: LoRARequest) -> None:
        adapter_id = request.lora_int_id
        self.usage.forget(adapter_id)
        if self._metrics is not None:
            self._metrics.forget(adapter_id)
        self._names.pop(adapter_id, None)
        self._changed.add(adapter_id)  # it may have left a slot

    def settle(
        self, state_of: Callable[[int], AdapterState], contents: tuple[int | None, ...]
    ) -> None:
        """What was begun is complete; costs next to nothing where nothing has changed."""
        if not self._changed:
            return
        changed, self._changed = self._changed, set()
        if self._metrics is not None:
            for adapter_id in changed:
                if adapter_id in self._names:
                    self._metrics.moved(adapter_id, state_of(adapter_id))
            self._metrics.contents(contents)
