"""From snapshots of the metrics to observations of the server."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from vllm_multilora.metrics import definitions as metrics
from vllm_multilora.metrics.label_values import SHARED
from vllm_multilora.toolbox.advice.observations import (
    ACTIVITY_WINDOW_S,
    HostMemoryUse,
    LoadTimes,
    Observations,
    SeenAdapter,
)
from vllm_multilora.toolbox.advice.snapshots import (
    FINISHED,
    GENERATED,
    LOAD_TIME_BUCKETS,
    Samples,
    ScrapedSeries,
    Snapshot,
)
from vllm_multilora.toolbox.clients.http_client import UnreachableError

# What tells one engine from another; Prometheus adds the first two.
_ENGINE_LABELS = ("job", "instance", "model_name", "engine")

Engine = tuple[str, ...]


def observe(seen: Sequence[Snapshot]) -> Observations:
    """What the snapshots of a window say.

    Counters count from the first snapshot that an engine is in, and from zero after a restart.

    Raises:
        UnreachableError: They hold no LoRA metrics.
    """
    engines = _by_engine(seen)
    if not engines:
        raise UnreachableError(
            f"found {metrics.SLOTS.name!r} less than twice among the metrics: is this a vLLM "
            "server with vllm-multilora and --enable-lora, and was it scraped during the window?"
        )
    growths = [_growth(watched) for watched in engines.values()]
    last = [watched[-1].samples for watched in engines.values()]
    grown = {series: growth for each in growths for series, growth in each.items()}
    return Observations(
        window_s=max(watched[-1].at - watched[0].at for watched in engines.values()),
        model=next(iter(engines))[_ENGINE_LABELS.index("model_name")],
        slots=max(int(_total(samples, metrics.SLOTS.name)) for samples in last),
        max_rank=max(int(_total(samples, metrics.MAX_RANK.name)) for samples in last) or None,
        active=max(map(_most_active, engines.values())),
        peak_requested=max(
            int(_total(snap.samples, metrics.REQUESTED.name))
            for watched in engines.values()
            for snap in watched
        ),
        gpu_evictions=max(_total(each, metrics.EVICTIONS.name, tier="gpu") for each in growths),
        cpu_evictions=max(_total(each, metrics.EVICTIONS.name, tier="cpu") for each in growths),
        host=max(map(_host_memory, last), key=lambda host: (host.bytes, host.adapters)),
        requests=_by_label(grown, metrics.REQUESTS.name, "lora_name"),
        finished=_total(grown, FINISHED),
        load_times=_load_times(grown),
        failures=_by_label(grown, metrics.LOAD_FAILURES.name, "reason"),
        adapters=_adapters(last),
        # Not requests: those for adapters that cannot be had are counted there, too.
        names_are_cut=any(
            series.name == metrics.LOADS.name and series.label("lora_name") in SHARED
            for samples in last
            for series in samples
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
            if any(series.name == metrics.SLOTS.name for series in samples):
                found[engine].append(Snapshot(snap.at, samples))
    return {engine: watched for engine, watched in sorted(found.items()) if len(watched) >= 2}


def _steps(watched: Sequence[Snapshot]) -> Iterator[tuple[float, Samples]]:
    """What every counter grew by from snapshot to snapshot, and when."""
    before = dict(watched[0].samples)
    for snap in watched[1:]:
        grown = {}
        for series, value in snap.samples.items():
            had = before.get(series, 0.0)
            # Below what it was: the process began anew, from zero.
            grown[series] = value - had if value >= had else value
        before.update(snap.samples)
        yield snap.at, grown


def _growth(watched: Sequence[Snapshot]) -> Samples:
    total: dict[ScrapedSeries, float] = defaultdict(float)
    for _, grown in _steps(watched):
        for series, growth in grown.items():
            total[series] += growth
    return total


def rates(before: Snapshot, now: Snapshot) -> dict[str, float]:
    """What a server has done per second between two snapshots; copies into slots are no loads."""
    growth = _growth((before, now)).items()
    grown = {series: n for series, n in growth if series.label("source") != "cpu"}
    names = {"tokens": GENERATED, "requests": FINISHED, "loads": metrics.LOADS.name}
    names["refusals"] = metrics.REFUSED.name
    return {what: _total(grown, name) / (now.at - before.at) for what, name in names.items()}


def _most_active(watched: Sequence[Snapshot]) -> int:
    """Most adapters with a request within five minutes, at any snapshot."""
    last_request: dict[str, float] = {}
    most = 0
    for at, grown in _steps(watched):
        last_request |= dict.fromkeys(_by_label(grown, metrics.REQUESTS.name, "lora_name"), at)
        most = max(most, sum(at - last < ACTIVITY_WINDOW_S for last in last_request.values()))
    return most


def _total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of all series of a name that have these labels."""
    return sum(
        value
        for series, value in samples.items()
        if series.name == name and labels.items() <= series.labels
    )


def _by_label(samples: Samples, name: str, label: str) -> dict[str, float]:
    """What is above 0 of all series of a name, summed by a label's value."""
    totals: dict[str, float] = defaultdict(float)
    for series, value in samples.items():
        if series.name == name and value > 0:
            totals[series.label(label)] += value
    return dict(totals)


def _host_memory(samples: Samples) -> HostMemoryUse:
    def limit(name: str) -> float | None:
        value = _total(samples, name, tier="cpu")
        return value if 0 < value < math.inf else None

    adapters_limit = limit(metrics.CACHE_ADAPTERS_LIMIT.name)
    return HostMemoryUse(
        adapters=int(_total(samples, metrics.CACHE_ADAPTERS.name, tier="cpu")),
        bytes=_total(samples, metrics.CACHE_BYTES.name, tier="cpu"),
        adapters_limit=None if adapters_limit is None else int(adapters_limit),
        bytes_limit=limit(metrics.CACHE_BYTES_LIMIT.name),
    )


def _load_times(grown: Samples) -> LoadTimes:
    cumulative: dict[float, float] = defaultdict(float)
    for series, growth in grown.items():
        if series.name == LOAD_TIME_BUCKETS and series.label("source") == "disk":
            cumulative[float(series.label("le"))] += growth
    counts, below = {}, 0.0
    for bound, count in sorted(cumulative.items()):
        counts[bound] = count - below
        below = count
    return LoadTimes(counts)


def _adapters(last: Iterable[Samples]) -> tuple[SeenAdapter, ...]:
    """Every adapter once; where engines differ, as the one says that has it nearest to the GPU."""
    found: dict[str, SeenAdapter] = {}
    for samples in last:
        for series, value in samples.items():
            if series.name != metrics.INFO.name or not value:
                continue
            adapter = SeenAdapter(
                name=series.label("lora_name"),
                rank=int(series.label("rank") or 0),
                tier=series.label("tier"),
                pinned=series.label("pinned").lower() in ("true", "1"),
            )
            known = found.get(adapter.name)
            if known is None or _NEARNESS.get(adapter.tier, 0) > _NEARNESS.get(known.tier, 0):
                found[adapter.name] = adapter
    return tuple(found[name] for name in sorted(found))


_NEARNESS = {"gpu": 2, "cpu": 1}
