"""What is remembered about each adapter's use, for those who ask."""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import dataclass, replace

from vllm_multilora.slots.events import Tier

MAX_REMEMBERED = 65_536
"""Adapters of which something is remembered: versions and failed registrations add up."""


@dataclass
class AdapterUse:
    """One adapter's use so far.

    Attributes:
        gpu_hits: How often it joined a batch and had a slot already.
        cpu_hits: How often it joined a batch without a slot and had a host copy.
        loads: How often its files were read.
        last_used: Unix seconds of the last step with it; None: none so far.
        last_error: Why its last load failed; None if it did not.
        rank: The highest rank in it; None before it was read for the first time.
        size: Bytes of its host copy, as it was when read last; None as for `rank`.
    """

    gpu_hits: int = 0
    cpu_hits: int = 0
    loads: int = 0
    last_used: float | None = None
    last_error: str | None = None
    rank: int | None = None
    size: int | None = None


class AdapterUsage:
    """Each adapter's use, by number, until the adapter is unloaded; one caller at a time."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._uses: dict[int, AdapterUse] = {}
        self._step: frozenset[int] = frozenset()
        self._step_at = 0.0

    def of(self, adapter_id: int) -> AdapterUse:
        """The adapter's use, as a copy; all zero for one that is not known."""
        use = self._uses.get(adapter_id, AdapterUse())
        return replace(use, last_used=self._step_at if adapter_id in self._step else use.last_used)

    def step(self, adapter_ids: Set[int]) -> None:
        """A step with these adapters begins."""
        if adapter_ids != self._step:
            for adapter_id in self._step:  # of those that stay, too, something was heard
                self._use(adapter_id).last_used = self._step_at
            self._step = frozenset(adapter_ids)
        self._step_at = self._clock()

    def read(self, adapter_id: int, rank: int, size: int) -> None:
        self._use(adapter_id).loads += 1
        self.found(adapter_id, rank, size)

    def found(self, adapter_id: int, rank: int, size: int) -> None:
        """The adapter was in memory: under another name, or for another server."""
        use = self._use(adapter_id)
        use.last_error, use.rank, use.size = None, rank, size

    def failed(self, adapter_id: int, reason: str) -> None:
        """The adapter could not be loaded, or not be copied into its slot."""
        self._use(adapter_id).last_error = reason

    def forget(self, adapter_id: int) -> None:
        self._step -= {adapter_id}
        self._uses.pop(adapter_id, None)

    def hit(self, tier: Tier, adapter_id: int) -> None:
        """The adapter was in the tier when a request needed it."""
        use = self._use(adapter_id)
        if tier is Tier.GPU:
            use.gpu_hits += 1
        else:
            use.cpu_hits += 1

    def _use(self, adapter_id: int) -> AdapterUse:
        use = self._uses.pop(adapter_id, None)
        if use is None:
            if len(self._uses) >= MAX_REMEMBERED:
                del self._uses[next(iter(self._uses))]
            use = AdapterUse()
        self._uses[adapter_id] = use  # at the end: those of which nothing was heard for longest go
        return use
