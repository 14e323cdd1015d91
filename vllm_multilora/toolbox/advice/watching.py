"""From snapshots of the metrics to observations of the server."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from vllm_multilora.metrics.label_values import SHARED
from vllm_multilora.toolbox.advice import snapshots as names
from vllm_multilora.toolbox.advice.observations import (
    ACTIVITY_WINDOW_S,
    HostMemoryUse,
    LoadTimes,
    Observations,
    SeenAdapter,
)
from vllm_multilora.toolbox.advice.snapshots import ScrapedSeries, Snapshot
from vllm_multilora.toolbox.clients.http_client import UnreachableError

# What tells one engine from another; Prometheus adds the first two.
_ENGINE_LABELS = ("job", "instance", "model_name", "engine")

Engine = tuple[str, ...]


def observe(seen: Sequence[Snapshot]) -> Observations:
    """What the snapshots of a window say.

    Counters count from the first snapshot that an engine is in, and from zero after a restart.

    Args:
        seen: Two or more, in the order of time.

    Raises:
        UnreachableError: They hold no LoRA metrics.
    """
    engines = _by_engine(seen)
    if not engines:
        raise UnreachableError(
            f"found {names.SLOTS!r} less than twice among the metrics: is this a vLLM server with "
            "vllm-multilora and --enable-lora, and was it scraped during the window?"
        )
    growths = {engine: _growth(watched) for engine, watched in engines.items()}
    last = {engine: watched[-1] for engine, watched in engines.items()}
    every = [item for growth in growths.values() for item in growth.items()]
    return Observations(
        window_s=max(watched[-1].at - watched[0].at for watched in engines.values()),
        model=next(iter(engines))[_ENGINE_LABELS.index("model_name")],
        slots=max(int(_value(snap, names.SLOTS)) for snap in last.values()),
        max_rank=max((int(_value(s, names.MAX_RANK)) for s in last.values()), default=0) or None,
        active=max(map(_most_active, engines.values())),
        peak_requested=max(
            int(_value(snap, names.REQUESTED)) for watched in engines.values() for snap in watched
        ),
        gpu_evictions=max(_grown(growth, names.EVICTIONS, "gpu") for growth in growths.values()),
        cpu_evictions=max(_grown(growth, names.EVICTIONS, "cpu") for growth in growths.values()),
        host=max(map(_host_memory, last.values()), key=lambda host: (host.bytes, host.adapters)),
        requests=_by_label(every, names.REQUESTS, "lora_name"),
        finished=sum(grown for series, grown in every if series.name == names.FINISHED),
        load_times=_load_times(every),
        failures=_by_label(every, names.FAILURES, "reason"),
        adapters=_adapters(last.values()),
        # Not requests: those for adapters that cannot be had are counted there, too.
        names_are_cut=any(
            series.name == names.LOADS and series.label("lora_name") in SHARED
            for snap in last.values()
            for series in snap.samples
        ),
    )


def _by_engine(seen: Sequence[Snapshot]) -> dict[Engine, list[Snapshot]]:
    """Each engine's snapshots, with its series alone; engines that were seen once are left out."""
    found: dict[Engine, list[Snapshot]] = defaultdict(list)
    for snap in seen:
        parts: dict[Engine, dict[ScrapedSeries, float]] = defaultdict(dict)
        for series, value in snap.samples.items():
            labels = dict(series.labels)
            parts[tuple(labels.get(name, "") for name in _ENGINE_LABELS)][series] = value
        for engine, samples in parts.items():
            if any(series.name == names.SLOTS for series in samples):
                found[engine].append(Snapshot(snap.at, samples))
    return {engine: watched for engine, watched in sorted(found.items()) if len(watched) >= 2}


def _steps(watched: Sequence[Snapshot]) -> Iterator[tuple[float, Counter[ScrapedSeries]]]:
    """What every counter grew by from snapshot to snapshot, and when."""
    before: dict[ScrapedSeries, float] = dict(watched[0].samples)
    for _, snap in pairwise(watched):
        grown: Counter[ScrapedSeries] = Counter()
        for series, value in snap.samples.items():
            had = before.get(series, 0.0)
            # Below what it was: the process began anew, from zero.
            grown[series] = value - had if value >= had else value  # type: ignore[assignment]
        before.update(snap.samples)
        yield snap.at, grown


def _growth(watched: Sequence[Snapshot]) -> Mapping[ScrapedSeries, float]:
    total: Counter[ScrapedSeries] = Counter()
    for _, grown in _steps(watched):
        total.update(grown)
    return total


def _most_active(watched: Sequence[Snapshot]) -> int:
    """Most adapters with a request within five minutes, at any snapshot."""
    last_request: dict[str, float] = {}
    most = 0
    for at, grown in _steps(watched):
        for series, requests in grown.items():
            if series.name == names.REQUESTS and requests > 0:
                last_request[series.label("lora_name")] = at
        most = max(most, sum(at - last < ACTIVITY_WINDOW_S for last in last_request.values()))
    return most


def _value(snap: Snapshot, name: str, **labels: str) -> float:
    """The sum of a gauge's series with these labels."""
    return sum(
        value
        for series, value in snap.samples.items()
        if series.name == name and labels.items() <= series.labels
    )


def _limit(snap: Snapshot, name: str) -> float | None:
    value = _value(snap, name, tier="cpu")
    return value if 0 < value < math.inf else None


def _host_memory(snap: Snapshot) -> HostMemoryUse:
    adapters_limit = _limit(snap, names.CACHE_ADAPTERS_LIMIT)
    return HostMemoryUse(
        adapters=int(_value(snap, names.CACHE_ADAPTERS, tier="cpu")),
        bytes=_value(snap, names.CACHE_BYTES, tier="cpu"),
        adapters_limit=None if adapters_limit is None else int(adapters_limit),
        bytes_limit=_limit(snap, names.CACHE_BYTES_LIMIT),
    )


def _grown(growth: Mapping[ScrapedSeries, float], name: str, tier: str) -> float:
    return sum(
        grown
        for series, grown in growth.items()
        if series.name == name and series.label("tier") == tier
    )


def _by_label(
    grown: Sequence[tuple[ScrapedSeries, float]], name: str, label: str
) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    for series, growth in grown:
        if series.name == name and growth > 0:
            totals[series.label(label)] += growth
    return dict(totals)


def _load_times(grown: Sequence[tuple[ScrapedSeries, float]]) -> LoadTimes:
    cumulative: dict[float, float] = defaultdict(float)
    for series, growth in grown:
        if series.name == names.LOAD_TIME_BUCKETS and series.label("source") == "disk":
            cumulative[float(series.label("le"))] += growth
    counts, below = {}, 0.0
    for bound in sorted(cumulative):
        counts[bound] = cumulative[bound] - below
        below = cumulative[bound]
    return LoadTimes(counts)


def _adapters(snaps: Iterable[Snapshot]) -> tuple[SeenAdapter, ...]:
    """Every adapter once; where engines differ, as the one says that has it nearest to the GPU."""
    found: dict[str, SeenAdapter] = {}
    for snap in snaps:
        for series, value in snap.samples.items():
            if series.name != names.INFO or not value:
                continue
            labels = dict(series.labels)
            adapter = SeenAdapter(
                name=labels.get("lora_name", ""),
                rank=int(labels.get("rank") or 0),
                tier=labels.get("tier", ""),
                pinned=labels.get("pinned", "").lower() in ("true", "1"),
            )
            known = found.get(adapter.name)
            if known is None or _NEARNESS.get(adapter.tier, 0) > _NEARNESS.get(known.tier, 0):
                found[adapter.name] = adapter
    return tuple(found[name] for name in sorted(found))


_NEARNESS = {"gpu": 2, "cpu": 1}
