"""What was observed of a server over a window of time: the facts that advice is based on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

ACTIVITY_WINDOW_S = 300.0
"""An adapter is active if it had a request within this time."""


@dataclass(frozen=True)
class LoadTimes:
    """Loads from disk by the upper bound of their bucket in milliseconds, not cumulative."""

    counts: Mapping[float, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.counts.values())

    def longer_than(self, limit_ms: float) -> float:
        """Loads that surely took longer; those of a bucket across the limit are not counted."""
        bounds = pairwise([0.0, *sorted(self.counts)])
        return sum(self.counts[upper] for lower, upper in bounds if lower >= limit_ms)

    def quantile(self, q: float) -> float:
        """The upper bound of the bucket that a quantile falls into; NaN without loads."""
        if not self.total:
            return math.nan
        seen = 0.0
        for upper in sorted(self.counts):
            seen += self.counts[upper]
            if seen >= q * self.total:
                return upper
        return math.inf


@dataclass(frozen=True)
class HostMemoryUse:
    """Host memory for adapters, as one engine has been told of it; engines may share it.

    Attributes:
        adapters_limit: Most adapters (`--max-cpu-loras`); None where bytes alone count.
        bytes_limit: Most bytes; None where adapters alone count.
    """

    adapters: int = 0
    bytes: float = 0.0
    adapters_limit: int | None = None
    bytes_limit: float | None = None

    @property
    def mean(self) -> float:
        """Bytes of an adapter on average; 0 without adapters."""
        return self.bytes / self.adapters if self.adapters else 0.0

    def share(self, adapters: int, size: float) -> float:
        """The part of a limit that so many adapters and bytes take, the larger; 0 without any."""
        parts = ((adapters, self.adapters_limit), (size, self.bytes_limit))
        return max((each / limit for each, limit in parts if limit is not None), default=0.0)


@dataclass(frozen=True)
class SeenAdapter:
    """One adapter as the server describes it at the window's end.

    Attributes:
        rank: Its highest rank.
        tier: `gpu`, `cpu` or `disk`.
    """

    name: str
    rank: int
    tier: str
    pinned: bool = False


@dataclass(frozen=True)
class Observations:
    """A window of a server's life.

    A server of several engines (data parallelism) has one set of flags for all of them, so what
    decides about a flag is the engine that needs most: attributes that say "of an engine" are the
    largest of all engines. Everything else is the sum.

    Attributes:
        slots: Adapter slots of an engine (`--max-loras`).
        max_rank: `--max-lora-rank`; None if the server does not say.
        active: Most adapters of an engine with a request in some five minutes of the window.
        peak_requested: Most adapters of an engine with unfinished requests at one time.
        gpu_evictions: Adapters of an engine that lost their slot to others in the window.
        cpu_evictions: Adapters of an engine that left host memory in the window.
        host: Host memory of the store that holds most.
        requests: Requests accepted in the window by adapter, shared labels included.
        finished: All requests finished in the window, those of the base model included.
        names_are_cut: Whether some adapters hide behind a label that they share, as blends do:
            counts of adapters are too low then, and nothing is known of their ranks.
        has_all_ranks: Whether the server has read every adapter, and so knows the ranks of all.
    """

    window_s: float
    slots: int
    model: str = ""
    max_rank: int | None = None
    active: int = 0
    peak_requested: int = 0
    gpu_evictions: float = 0.0
    cpu_evictions: float = 0.0
    host: HostMemoryUse = HostMemoryUse()
    requests: Mapping[str, float] = field(default_factory=dict)
    finished: float = 0.0
    load_times: LoadTimes = LoadTimes()
    failures: Mapping[str, float] = field(default_factory=dict)
    adapters: tuple[SeenAdapter, ...] = ()
    names_are_cut: bool = False
    has_all_ranks: bool = False
