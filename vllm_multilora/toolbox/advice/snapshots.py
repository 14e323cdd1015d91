"""The LoRA metrics at one moment, from a server's `/metrics` or from Prometheus.

Both ways end in the same `Snapshot`s, so that everything that is concluded from them is concluded
once, in `watching.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_multilora.metrics import definitions as metrics
from vllm_multilora.toolbox.clients.http_client import UnreachableError, get_json, send

REQUESTED = metrics.REQUESTED.name
FINISHED, GENERATED = "vllm:request_success_total", "vllm:generation_tokens_total"
"""vLLM's own: all requests that finished and their tokens, the base model's too."""
LOAD_TIME_BUCKETS = f"{metrics.LOAD_DURATION.name}_bucket"

_USED = (
    *(metrics.SLOTS, metrics.MAX_RANK, metrics.REQUESTED, metrics.REQUESTS, metrics.LOADS),
    *(metrics.EVICTIONS, metrics.LOAD_FAILURES, metrics.CACHE_ADAPTERS, metrics.CACHE_BYTES),
    *(metrics.CACHE_ADAPTERS_LIMIT, metrics.CACHE_BYTES_LIMIT, metrics.INFO, metrics.REFUSED),
)
NAMES = frozenset((FINISHED, GENERATED, LOAD_TIME_BUCKETS, *(metric.name for metric in _USED)))
"""The names of all samples that are looked at; others are skipped."""

_GOOD_STEPS = 240
_MIN_STEP_S = 15.0
# Two steps are the five minutes within which an adapter is active.
_MAX_STEP_S = 150.0
LONGEST_HISTORY_S = 86_400.0
"""Seconds in the longest past window: longer ones have too many samples at that step."""


@dataclass(frozen=True)
class ScrapedSeries:
    """One time series, by the name of its samples, `_total` or `_bucket` included, and labels."""

    name: str
    labels: frozenset[tuple[str, str]]

    def label(self, name: str) -> str:
        """A label's value; empty where the series has no such label."""
        return dict(self.labels).get(name, "")


Samples = Mapping[ScrapedSeries, float]


@dataclass(frozen=True)
class Snapshot:
    """Samples of one moment, in seconds by a clock that all snapshots of a window share."""

    at: float
    samples: Samples


def parse_exposition(text: str, at: float) -> Snapshot:
    """The LoRA metrics in the text of `/metrics`.

    Raises:
        UnreachableError: The text is none of Prometheus' format.
    """
    from prometheus_client.parser import text_string_to_metric_families

    try:
        samples = {
            ScrapedSeries(sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in NAMES
        }
    except ValueError as error:
        raise UnreachableError(
            f"/metrics did not answer in Prometheus's text format: {error}"
        ) from error
    return Snapshot(at, samples)


def scrape(url: str, *, api_key: str | None = None) -> Snapshot:
    """The metrics of a server now, by the clock that nobody sets; raises as `parse_exposition`."""
    return parse_exposition(send("GET", f"{url}/metrics", api_key=api_key), time.monotonic())


def history(url: str, window_s: float, matching: str = "", *, now: float) -> list[Snapshot]:
    """The metrics of a past window, as Prometheus has them.

    Args:
        url: Prometheus' address, without path.
        window_s: Seconds before `now`, up to `LONGEST_HISTORY_S`.
        matching: Further label matchers, as `job="vllm",instance="a:8000"`.
        now: The window's end, in Unix time.

    Raises:
        UnreachableError: Prometheus gives no answer, or one that says what is wrong.
    """
    step = max(_MIN_STEP_S, min(window_s / _GOOD_STEPS, _MAX_STEP_S))
    steps = max(1, round(window_s / step))
    times = [now - step * (steps - i) for i in range(steps + 1)]
    names = "|".join(sorted(NAMES - {REQUESTED}))
    selector = f'{{__name__=~"{names}",{matching}}}'
    # What a gauge was at its highest between two steps, not what it happens to be at a step.
    peaks = f"max_over_time({REQUESTED}{{{matching}}}[{step:.0f}s])"
    rows = _range_query(url, selector, times, step)
    rows += [
        (labels | {"__name__": REQUESTED}, values)
        for labels, values in _range_query(url, peaks, times, step)
    ]
    if steps > 2 and rows and all(len(values) < 2 for _, values in rows):
        # Prometheus began less than two steps ago, and a shorter window has shorter ones.
        return history(url, 2 * step, matching, now=now)
    samples: list[dict[ScrapedSeries, float]] = [{} for _ in times]
    for labels, values in rows:
        series = ScrapedSeries(labels.pop("__name__", ""), frozenset(labels.items()))
        for at, value in values:
            index = round((at - times[0]) / step)
            if 0 <= index < len(times):
                samples[index][series] = value
    return [Snapshot(at, found) for at, found in zip(times, samples, strict=True)]


_Row = tuple[dict[str, str], list[tuple[float, float]]]
"""A series' labels, and its values, each with its time."""


def _range_query(url: str, query: str, times: list[float], step: float) -> list[_Row]:
    start, end = f"{times[0]:.3f}", f"{times[-1] + step / 2:.3f}"
    answer = get_json(
        f"{url}/api/v1/query_range",
        {"query": query, "start": start, "end": end, "step": f"{step:.3f}"},
    )
    try:
        return [
            (dict(row["metric"]), [(float(at), float(value)) for at, value in row["values"]])
            for row in answer["data"]["result"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        shown = str(answer)[:200]
        raise UnreachableError(f"{url} does not answer like Prometheus: {shown}") from error
