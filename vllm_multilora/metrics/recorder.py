"""Counts and measures in one process, in a file of its own."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

from vllm_multilora.metrics import definitions as defined
from vllm_multilora.metrics.label_values import BoundedNames, Places
from vllm_multilora.metrics.series_file import (
    FileName,
    Key,
    ProcessStamp,
    SeriesFile,
    SeriesFileFullError,
    UnreadableSeriesFileError,
)

logger = logging.getLogger(__name__)

MODEL_NAME = "model_name"
"""Key, followed by the name, under which a file tells what its series are labelled with."""

_FIXED_BYTES = 1 << 16
_BYTES_PER_ADAPTER = 6 * 384  # of six series, with a name of the longest
_USERS_PER_ADAPTER = 2  # with series of their own in counts of tokens: by route, by tenant
_BYTES_PER_USER = (3 + 2 + 2) * 384  # refused requests and a route's, a tenant's tokens and limit
_BYTES_OF_LATENCIES = sum(len(one.buckets) + 2 for one in defined.LATENCIES) * 384

MAX_STATUSES = 4
"""With which a request is refused for who sent it."""

# Where a key has the name of an adapter.
_NAME_AT = {
    each.name: 1 + each.labels.index("lora_name")
    for each in defined.ALL
    if "lora_name" in each.labels
}


class Series:
    """One number that can be added to or set; from any thread."""

    __slots__ = ("_cell", "_file", "_value")

    def __init__(self, file: SeriesFile | None, cell: str) -> None:
        self._file = file
        self._cell = cell
        self._value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        if (file := self._file) is not None:
            with file.lock:
                self._value += amount
                if self._file is not None:
                    file.write(self._cell, self._value)

    def set(self, value: float) -> None:
        if (file := self._file) is not None:
            with file.lock:
                self._value = value
                if self._file is not None:
                    file.write(self._cell, value)

    def end(self) -> None:
        """Its place in the file is gone; called with the file's lock held."""
        self._file = None


class Histogram:
    """Counts observations by bucket, and their sum; from any thread. The last bucket is open."""

    __slots__ = ("_bounds", "_buckets", "_total")

    def __init__(self, bounds: tuple[float, ...], buckets: list[Series], total: Series) -> None:
        self._bounds = bounds
        self._buckets = buckets
        self._total = total

    def observe(self, value: float) -> None:
        self._buckets[bisect_left(self._bounds, value)].inc()
        self._total.inc(value)


class Recorder:
    """The metrics of one process.

    Args:
        engine: vLLM's number of the engine; empty for a server.
        max_adapters: Most adapters with a label of their own.

    Attributes:
        users: Combinations of adapter, route and tenant with series of their own.
        routes: Of route, adapter and reason.
        refused: Of tenant and status.
        tenants: Tenants whose limit of tokens is shown.

    Raises:
        OSError: The file cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        *,
        role: str,
        engine: str,
        model_name: str,
        max_adapters: int,
        has_latencies: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        name = FileName(role, engine, ProcessStamp.own())
        most_users = _USERS_PER_ADAPTER * max_adapters
        self._clock = clock
        self.names = BoundedNames(max_adapters, self._remove_names, clock)
        self.users = self._places(most_users, *defined.TOKENS)
        self.routes = self._places(most_users, defined.ROUTE_REQUESTS)
        self.refused = self._places(max(most_users, MAX_STATUSES), defined.REFUSED)
        self.tenants = self._places(most_users, defined.TENANT_TOKENS, defined.TENANT_LIMIT)
        size = _FIXED_BYTES + (max_adapters + 1) * _BYTES_PER_ADAPTER
        if role == "server":
            size += (most_users + 2) * _BYTES_PER_USER
        if has_latencies:
            size += (max_adapters + 1) * _BYTES_OF_LATENCIES
        self._file = SeriesFile(folder / str(name), size)
        self._series: dict[Key, Series] = {}
        self._histograms: dict[Key, Histogram] = {}
        self._is_full = False
        self.series_at((MODEL_NAME, model_name))

    def series(self, definition: defined.Definition, *labels: str) -> Series:
        """A counter's or gauge's series with these values of its labels; 0 if it is new."""
        return self.series_at((definition.name, *labels))

    def histogram(self, definition: defined.Definition, *labels: str) -> Histogram:
        """A histogram with these values of its labels."""
        key = (definition.name, *labels)
        histogram = self._histograms.get(key)
        if histogram is None:
            bounds = (*definition.buckets, float("inf"))
            histogram = self._histograms[key] = Histogram(
                definition.buckets,
                [self.series_at((*key, repr(bound))) for bound in bounds],
                self.series_at((*key, "sum")),
            )
        return histogram

    def series_at(self, key: Key) -> Series:
        series = self._series.get(key)
        if series is not None:
            return series
        with self._file.lock:
            series = self._series.get(key)
            if series is None:
                series = self._series[key] = self._new_series(key)
        return series

    def _new_series(self, key: Key) -> Series:
        try:
            return Series(self._file, self._file.cell(key))
        except SeriesFileFullError as error:
            if not self._is_full:
                logger.warning("Some LoRA metrics are missing from now on: %s.", error)
            self._is_full = True
            return Series(None, "")

    def _places(self, limit: int, *definitions: defined.Definition) -> Places[Key]:
        names = {definition.name for definition in definitions}

        def vacate(labels: frozenset[Key]) -> bool:
            return self._remove(lambda key: key[0] in names and key[1:] in labels)

        return Places(limit, vacate, self._clock)

    def _remove_names(self, names: frozenset[str]) -> bool:
        return self._remove(lambda key: key[0] in _NAME_AT and key[_NAME_AT[key[0]]] in names)

    def _remove(self, goes: Callable[[Key], bool]) -> bool:
        """Removes series, which begin at 0 should they come again; returns whether it could."""
        with self._file.lock:
            gone = [key for key in self._series if goes(key)]
            try:
                self._file.remove(gone)
            except BlockingIOError:
                return False  # somebody reads
            except (OSError, UnreadableSeriesFileError) as error:
                logger.warning("LoRA metrics of the idle keep their places for now: %s", error)
                return False
            for key in gone:
                self._series.pop(key).end()
            self._histograms = {k: one for k, one in self._histograms.items() if not goes(k)}
        return True

    def close(self) -> None:
        """Ends recording; what was recorded stays."""
        self._file.close()
