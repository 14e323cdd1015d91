"""What one worker records of its adapters: where they are, and how they got there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_multilora.cache.adapter_cache import AdapterCache
from vllm_multilora.cache.events import CacheEvents
from vllm_multilora.cache.load_failures import FailureKind
from vllm_multilora.cache.states import AdapterState, Tier
from vllm_multilora.metrics import definitions as defined
from vllm_multilora.metrics.adapter_info import AdapterInfo
from vllm_multilora.metrics.names import OTHER
from vllm_multilora.metrics.recorder import Recorder


@dataclass(frozen=True)
class _Place:
    """Where an adapter was found last."""

    name: str
    tier: str
    size: int


class TierMetrics(CacheEvents):
    """Turns a cache's events and a loader's ends into metrics.

    `read`, `copied` and `failed` may be called on any thread, all else on the worker's main one.
    vLLM's warm-up adapters never get into the cache, and so into none of this.

    Args:
        recorder: Records.
        name_of: An adapter's name by its number; None if it is not known.
        rank_of: The highest rank in an adapter; None if it was never read.
    """

    def __init__(
        self,
        recorder: Recorder,
        name_of: Callable[[int], str | None],
        rank_of: Callable[[int], int | None],
    ) -> None:
        self._recorder = recorder
        self._name_of = name_of
        self._rank_of = rank_of
        series = recorder.series
        self._hits = {tier: series(defined.HITS, tier.value) for tier in Tier}
        self._misses = {tier: series(defined.MISSES, tier.value) for tier in Tier}
        self._durations = {
            source: recorder.histogram(defined.LOAD_DURATION, source) for source in ("disk", "cpu")
        }
        self._failures = {kind: series(defined.LOAD_FAILURES, kind.value) for kind in FailureKind}
        self._active = series(defined.ACTIVE)
        self._slots_free = series(defined.SLOTS_FREE)
        self._adapters = {tier: series(defined.CACHE_ADAPTERS, tier.value) for tier in Tier}
        self._bytes = {tier: series(defined.CACHE_BYTES, tier.value) for tier in Tier}
        self._batch = recorder.histogram(defined.BATCH_ADAPTERS)
        self._places: dict[int, _Place] = {}
        # By name, in the order in which they came.
        self._versions: dict[str, dict[int, None]] = {}
        self._changed: set[int] = set()

    def begin(self, cache: AdapterCache, *, max_rank: int) -> None:
        """Records what stays the same, and the empty cache."""
        series, budget = self._recorder.series, cache.budget
        series(defined.SLOTS).set(len(cache.slots))
        series(defined.MAX_RANK).set(max_rank)
        if budget.bytes is not None:
            series(defined.CACHE_BYTES_LIMIT, Tier.CPU.value).set(budget.bytes)
        if budget.adapters is not None:
            series(defined.CACHE_ADAPTERS_LIMIT, Tier.CPU.value).set(budget.adapters)
        self._set_gauges(cache)

    # From the loader and from those who fill slots

    def read(self, name: str, seconds: float) -> None:
        """An adapter's files were read into host memory."""
        self._loaded("disk", name, seconds)

    def copied(self, adapter_id: int, seconds: float) -> None:
        """An adapter was copied into a slot."""
        self._loaded("cpu", self._name_of(adapter_id), seconds)

    def failed(self, kind: FailureKind) -> None:
        """An adapter could not be loaded."""
        self._failures[kind].inc()

    def _loaded(self, source: str, name: str | None, seconds: float) -> None:
        self._recorder.series(defined.LOADS, source, self._label(name)).inc()
        self._durations[source].observe(seconds * 1_000)

    def _label(self, name: str | None) -> str:
        return OTHER if name is None else self._recorder.names.label(name)

    # From the cache

    def hit(self, tier: Tier, adapter_id: int) -> None:
        self._hits[tier].inc()

    def miss(self, tier: Tier, adapter_id: int) -> None:
        self._misses[tier].inc()

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        label = self._label(self._name_of(adapter_id))
        self._recorder.series(defined.EVICTIONS, tier.value, label).inc()

    def moved(self, adapter_id: int, state: AdapterState) -> None:
        self._changed.add(adapter_id)

    # Steps and states

    def step(self, adapters: int) -> None:
        """A step with that many adapters begins."""
        self._batch.observe(adapters)

    def pinned(self, adapter_id: int) -> None:
        """An adapter's pin has changed."""
        self._changed.add(adapter_id)

    def settle(self, cache: AdapterCache) -> None:
        """Records the state, if it has changed; called when a change of the cache is complete."""
        if not self._changed:
            return
        changed, self._changed = self._changed, set()
        for adapter_id in changed:
            self._find(adapter_id, cache)
        self._set_gauges(cache)

    def _find(self, adapter_id: int, cache: AdapterCache) -> None:
        known = self._places.get(adapter_id)
        if cache.state(adapter_id) is AdapterState.GONE:
            if known is not None:
                del self._places[adapter_id]
                self._versions[known.name].pop(adapter_id, None)
                self._show(known.name, cache)
            return
        name = known.name if known is not None else self._name_of(adapter_id)
        if name is None:
            return
        size, slot = cache.size(adapter_id), cache.slot_of(adapter_id)
        tier = "gpu" if slot is not None else "disk" if size is None else "cpu"
        self._places[adapter_id] = _Place(name, tier, size or 0)
        self._versions.setdefault(name, {})[adapter_id] = None
        self._show(name, cache)

    def _show(self, name: str, cache: AdapterCache) -> None:
        """Records the info of a name's newest version that was read; 0 if there is none."""
        label = self._label(name)
        versions = self._versions[name]
        read = [i for i in versions if self._rank_of(i) is not None]
        if not versions:
            del self._versions[name]
        if label == OTHER:
            return
        number = 0.0
        if read:
            newest = read[-1]
            rank = self._rank_of(newest) or 0
            is_pinned = newest in cache.pinned
            number = AdapterInfo(self._places[newest].tier, rank, is_pinned).encode()
        self._recorder.series_at((defined.INFO.name, label)).set(number)

    def _set_gauges(self, cache: AdapterCache) -> None:
        in_slots = sum(adapter_id is not None for adapter_id in cache.slots)
        sizes = [
            cache.size(adapter_id) or 0 for adapter_id in cache.slots if adapter_id is not None
        ]
        self._active.set(in_slots)
        self._slots_free.set(len(cache.slots) - in_slots)
        self._adapters[Tier.GPU].set(in_slots)
        self._bytes[Tier.GPU].set(sum(sizes))
        self._adapters[Tier.CPU].set(cache.cpu_count)
        self._bytes[Tier.CPU].set(cache.cpu_bytes)
