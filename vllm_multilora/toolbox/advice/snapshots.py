"""The LoRA metrics at one moment, from a server's `/metrics` or from Prometheus.

Both ways end in the same `Snapshot`s, so that everything that is concluded from them is concluded
once, in `watching.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm_multilora.metrics import definitions as metrics
from vllm_multilora.toolbox.clients.http_client import UnreachableError, get_json, get_text

# What the advice rests on. One is vLLM's own: all requests that finished, the base model's too.
SLOTS = metrics.SLOTS.name
MAX_RANK = metrics.MAX_RANK.name
REQUESTED = metrics.REQUESTED.name
REQUESTS = metrics.REQUESTS.name
FINISHED = "vllm:request_success_total"
LOADS = metrics.LOADS.name
EVICTIONS = metrics.EVICTIONS.name
FAILURES = metrics.LOAD_FAILURES.name
LOAD_TIME_BUCKETS = f"{metrics.LOAD_DURATION.name}_bucket"
CACHE_ADAPTERS = metrics.CACHE_ADAPTERS.name
CACHE_ADAPTERS_LIMIT = metrics.CACHE_ADAPTERS_LIMIT.name
CACHE_BYTES = metrics.CACHE_BYTES.name
CACHE_BYTES_LIMIT = metrics.CACHE_BYTES_LIMIT.name
INFO = metrics.INFO.name

NAMES = frozenset(
    {
        *(SLOTS, MAX_RANK, REQUESTED, REQUESTS, FINISHED, LOADS, EVICTIONS, FAILURES),
        LOAD_TIME_BUCKETS,
        *(CACHE_ADAPTERS, CACHE_ADAPTERS_LIMIT, CACHE_BYTES, CACHE_BYTES_LIMIT, INFO),
    }
)
"""The names of all samples that are looked at; others are skipped."""

_GOOD_STEPS = 240
_MIN_STEP_S = 15.0
# Two steps are the five minutes within which an adapter is active.
_MAX_STEP_S = 150.0
LONGEST_HISTORY_S = 86_400.0
"""Seconds in the longest past window: longer ones have too many samples at that step."""


Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class ScrapedSeries:
    """One time series.

    Attributes:
        name: The sample's name, `_total`, `_bucket` and the like included.
        labels: Its labels.
    """

    name: str
    labels: Labels

    def label(self, name: str) -> str:
        """A label's value; empty where the series has no such label."""
        return dict(self.labels).get(name, "")


@dataclass(frozen=True)
class Snapshot:
    """Samples of one moment.

    Attributes:
        at: Seconds, by a clock that all snapshots of a window share.
        samples: The value of every series that was there.
    """

    at: float
    samples: Mapping[ScrapedSeries, float]


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
    """The metrics of a server now, by the clock that nobody sets.

    Args:
        url: The server's address, without path.
        api_key: Sent as bearer token, where there is one.

    Raises:
        UnreachableError: The server gives no metrics.
    """
    return parse_exposition(get_text(f"{url}/metrics", api_key=api_key), time.monotonic())


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
    return _by_time(rows, times, step)


_Row = tuple[dict[str, str], list[tuple[float, float]]]
"""A series' labels, and its values, each with its time."""


def _range_query(url: str, query: str, times: list[float], step: float) -> list[_Row]:
    answer = get_json(
        f"{url}/api/v1/query_range",
        {
            "query": query,
            "start": f"{times[0]:.3f}",
            "end": f"{times[-1] + step / 2:.3f}",
            "step": f"{step:.3f}",
        },
    )
    try:
        return [
            (dict(row["metric"]), [(float(at), float(value)) for at, value in row["values"]])
            for row in answer["data"]["result"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        shown = str(answer)[:200]
        raise UnreachableError(f"{url} does not answer like Prometheus: {shown}") from error


def _by_time(rows: Iterable[_Row], times: list[float], step: float) -> list[Snapshot]:
    samples: list[dict[ScrapedSeries, float]] = [{} for _ in times]
    for labels, values in rows:
        series = ScrapedSeries(labels.pop("__name__", ""), frozenset(labels.items()))
        for at, value in values:
            index = round((at - times[0]) / step)
            if 0 <= index < len(times):
                samples[index][series] = value
    return [Snapshot(at, found) for at, found in zip(times, samples, strict=True)]
