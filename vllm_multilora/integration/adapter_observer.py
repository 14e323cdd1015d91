"""Sees what happens to a worker's adapters, for metrics and for those who ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import TYPE_CHECKING

from vllm_multilora.cache import AdapterCache, CacheEvents
from vllm_multilora.cache.events import AllOf
from vllm_multilora.cache.load_failures import LoadFailure
from vllm_multilora.cache.usage import AdapterUsage
from vllm_multilora.metrics.recorder import Recorder
from vllm_multilora.metrics.tier_metrics import TierMetrics

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.host_adapter import HostAdapter


class AdapterObserver:
    """Told by `AdapterTiers`; changes nothing.

    Args:
        requests: The adapters that the worker knows, by number.
        recorder: Records metrics; None where they are off, or another worker reports.
        new_cache: Makes the cache, given who is told of its events.
        max_rank: Of the slots.

    Attributes:
        usage: Each adapter's use.
        cache: The cache.
    """

    def __init__(
        self,
        requests: Mapping[int, LoRARequest],
        recorder: Recorder | None,
        new_cache: Callable[..., AdapterCache],
        max_rank: int,
    ) -> None:
        self.usage = AdapterUsage()
        self._requests = requests
        self._metrics: TierMetrics | None = None
        events: CacheEvents = self.usage
        if recorder is not None:
            self._metrics = TierMetrics(recorder, self._name_of, self._rank_of)
            events = AllOf(self.usage, self._metrics)
        self.cache = new_cache(events=events)
        if self._metrics is not None:
            self._metrics.begin(self.cache, max_rank=max_rank)

    def _name_of(self, lora_id: int) -> str | None:
        request = self._requests.get(lora_id)
        return None if request is None else request.lora_name

    def _rank_of(self, lora_id: int) -> int | None:
        return self.usage.of(lora_id).rank

    def load_ended(
        self, request: LoRARequest, outcome: HostAdapter | LoadFailure, seconds: float
    ) -> None:
        """Files were read, or could not be; called on any thread."""
        if isinstance(outcome, LoadFailure):
            self.load_failed(request.lora_int_id, outcome)
            return
        self.usage.read(request.lora_int_id, outcome.rank, outcome.nbytes)
        if self._metrics is not None:
            self._metrics.read(request.lora_name, seconds)

    def load_failed(self, lora_id: int, failure: LoadFailure) -> None:
        """An adapter could not be had; called on any thread."""
        self.usage.failed(lora_id, failure)
        if self._metrics is not None:
            self._metrics.failed(failure.kind)

    def copied(self, lora_id: int, seconds: float) -> None:
        """An adapter was copied into its slot; called on any thread."""
        if self._metrics is not None:
            self._metrics.copied(lora_id, seconds)

    def step(self, lora_ids: Set[int]) -> None:
        """A step with these adapters begins."""
        self.usage.step(lora_ids)
        if self._metrics is not None:
            self._metrics.step(len(lora_ids))

    def pinned(self, lora_id: int) -> None:
        """An adapter was pinned."""
        if self._metrics is not None:
            self._metrics.pinned(lora_id)

    def settle(self) -> None:
        """What was begun is complete; costs nothing where nothing has changed."""
        if self._metrics is not None:
            self._metrics.settle(self.cache)
