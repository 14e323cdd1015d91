"""What the engine core records about its adapters: where they are, and how they got there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from vllm_multilora.failures import FailureKind
from vllm_multilora.metrics import definitions as defined
from vllm_multilora.metrics.definitions import AdapterInfo
from vllm_multilora.metrics.label_values import BLENDS, OTHER
from vllm_multilora.metrics.recorder import Recorder
from vllm_multilora.slots.adapter_usage import AdapterUse
from vllm_multilora.slots.events import SlotEvents, Tier
from vllm_multilora.states import AdapterState

_TIERS = {AdapterState.SLOT: "gpu", AdapterState.HOST: "cpu"}
_UNTOLD = object()


class AdapterMetrics(SlotEvents):
    """Turns the events of slots, and what the store and the workers tell, into metrics.

    One caller at a time, the engine core's main thread. vLLM's warm-up adapters get into none of
    this.
    """

    def __init__(
        self,
        recorder: Recorder,
        name_of: Callable[[int], str | None],
        use_of: Callable[[int], AdapterUse],
        *,
        slots: int,
        max_rank: int,
    ) -> None:
        self._recorder = recorder
        self._name_of = name_of
        self._use_of = use_of
        series = recorder.series
        series(defined.SLOTS).set(slots)
        series(defined.MAX_RANK).set(max_rank)
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
        self._known: dict[int, tuple[str, AdapterState]] = {}
        self._pinned: frozenset[int] = frozenset()
        # By name, in the order in which they came.
        self._versions: dict[str, dict[int, None]] = {}
        self._contents: object = _UNTOLD
        self.contents((None,) * slots)
        recorder.names.on_admitted = self._show

    # What happens

    def known(self, name: str) -> None:
        """An adapter of this name can be had: it is shown under it, if there is room."""
        self._recorder.names.admit(name)

    def loaded(self, source: str, name: str, seconds: float) -> None:
        """An adapter was read (from `disk`), or copied into a slot (from `cpu`)."""
        self._recorder.series(defined.LOADS, source, self._label(name)).inc()
        self._durations[source].observe(seconds * 1_000)

    def failed(self, kind: FailureKind) -> None:
        """An adapter could not be loaded, or was taken out of service."""
        self._failures[kind].inc()

    def hit(self, tier: Tier, adapter_id: int) -> None:
        self._hits[tier].inc()

    def miss(self, tier: Tier, adapter_id: int) -> None:
        self._misses[tier].inc()

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        """An adapter gave up its slot, as `SlotAssignment` says, or host memory, as the store."""
        label = self._label(self._name(adapter_id))
        self._recorder.series(defined.EVICTIONS, tier.value, label).inc()

    def assigned(self, adapter_id: int, slot: int) -> None:
        self._contents = _UNTOLD  # perhaps the same adapter in another version

    def step(self, adapters: int) -> None:
        self._batch.observe(adapters)

    # What is

    def contents(self, contents: tuple[int | None, ...]) -> None:
        """The adapter in each slot; costs next to nothing where they are the same as before."""
        if contents == self._contents:
            return
        self._contents = contents
        in_slots = [adapter_id for adapter_id in contents if adapter_id is not None]
        self._active.set(len(in_slots))
        self._slots_free.set(len(contents) - len(in_slots))
        self._adapters[Tier.GPU].set(len(in_slots))
        self._bytes[Tier.GPU].set(sum(self._use_of(i).size or 0 for i in in_slots))

    def kernels(self, rows: Iterable[Mapping[str, str]]) -> None:
        """Which kernels serve which layers; each of `defined.KERNELS`' labels is a key of a row."""
        for row in rows:
            labels = (row[label] for label in defined.KERNELS.labels)
            self._recorder.series(defined.KERNELS, *labels).set(1)

    def host_memory(
        self, adapters: int, nbytes: int, *, adapters_limit: int | None, bytes_limit: int | None
    ) -> None:
        """What host memory holds, and may hold; None is no limit."""
        self._adapters[Tier.CPU].set(adapters)
        self._bytes[Tier.CPU].set(nbytes)
        for definition, limit in (
            (defined.CACHE_ADAPTERS_LIMIT, adapters_limit),
            (defined.CACHE_BYTES_LIMIT, bytes_limit),
        ):
            if limit is not None:
                self._recorder.series(definition, Tier.CPU.value).set(limit)

    def moved(self, adapter_id: int, state: AdapterState) -> None:
        """An adapter is in another state; of one that has no name nothing is shown."""
        name = self._name(adapter_id)
        if name is None:
            return
        if adapter_id not in self._known:
            self._versions.setdefault(name, {})[adapter_id] = None
        self._known[adapter_id] = name, state
        self._show(name)

    def pinned(self, adapters: Iterable[int]) -> None:
        """The pinned adapters, when a pin has changed; some may not be known yet."""
        before, self._pinned = self._pinned, frozenset(adapters)
        for adapter_id in before ^ self._pinned:
            if (known := self._known.get(adapter_id)) is not None:
                self._show(known[0])

    def forget(self, adapter_id: int) -> None:
        if adapter_id in self._known:
            name, _ = self._known.pop(adapter_id)
            versions = self._versions[name]
            del versions[adapter_id]
            if not versions:
                del self._versions[name]
            self._show(name)

    def _name(self, adapter_id: int) -> str | None:
        known = self._known.get(adapter_id)
        return self._name_of(adapter_id) if known is None else known[0]

    def _label(self, name: str | None) -> str:
        return OTHER if name is None else self._recorder.names.label(name)

    def _show(self, name: str) -> None:
        """Records the info of a name's newest version that was read; 0 if there is none."""
        if name == BLENDS or not self._recorder.names.has(name):
            return
        number = 0.0
        for adapter_id in reversed(self._versions.get(name, {})):
            rank = self._use_of(adapter_id).rank
            if rank is not None:
                tier = _TIERS.get(self._known[adapter_id][1], "disk")
                number = AdapterInfo(tier, rank, adapter_id in self._pinned).encode()
                break
        self._recorder.series_at((defined.INFO.name, name)).set(number)
