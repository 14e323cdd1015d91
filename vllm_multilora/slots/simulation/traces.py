"""Request traces from files: which adapter was asked for, in which order.

A trace is CSV with a header line, or JSON lines. Columns or keys: `time` (a number in any unit,
it orders the requests), `adapter` (its name) and, optionally, `bytes` (its size in host memory).

A timed trace is one in the order of time, its times in seconds, that also says how much a request
asks for: `prompt_tokens` and `generation_tokens`, named as in the usage log.

A usage log is a trace, too: its requests that were answered, at the times when they ended.
"""

from __future__ import annotations

import csv
import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vllm_multilora.errors import MultiLoRAError

LIMIT = 2**63
"""Numbers of bytes and tokens are below it, so that their sums and quotients are floats."""

LONGEST_S = 2**32
"""Length of a timed trace in seconds: 136 years. Floats this large still resolve microseconds."""

_ENCODING = "utf-8-sig"  # with or without the mark that spreadsheets put first

_COLUMNS = ("time", "adapter")
_TOKENS = ("prompt_tokens", "generation_tokens")
_STATUS, _ANSWERED = "status", "ok"  # of a usage log
_LOGGED = '{"time":"'  # as its lines begin


class TraceError(MultiLoRAError, ValueError):
    """A trace or a table of sizes cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        requests: The adapter of each request.
        sizes: Bytes of those adapters whose size the trace states.
    """

    requests: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The distinct adapters, in the order of their first requests."""
        return tuple(dict.fromkeys(self.requests))


@dataclass(frozen=True)
class TimedRequest:
    """A request of a timed trace.

    Attributes:
        arrives_s: Seconds, from whenever the trace counts.
        adapter: The adapter's name; None in a usage log for the base model's.
        prompt_tokens: At least 1.
        generation_tokens: Likewise.
    """

    arrives_s: float
    adapter: str | None
    prompt_tokens: int
    generation_tokens: int


@dataclass(frozen=True)
class TimedTrace:
    """Requests in the order of their arrival, at least one; `sizes` as in `Trace`."""

    requests: tuple[TimedRequest, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)


def read_trace(path: Path) -> Trace:
    """Reads a `.csv` or `.jsonl` trace; requests of the same time keep their order.

    Raises:
        TraceError: The file cannot be read, or a line is wrong.
    """
    arrivals: list[tuple[float, str]] = []
    sizes: dict[str, int] = {}
    for where, row in _rows(path, _COLUMNS):
        time, adapter = _time(row, where), _adapter(row, where)
        if adapter is not None:
            arrivals.append((time, adapter))
            _note_size(row, adapter, sizes, where)
    if not arrivals:
        raise TraceError(f"{path}: contains no requests for adapters")
    arrivals.sort(key=lambda arrival: arrival[0])
    return Trace(tuple(adapter for _, adapter in arrivals), sizes)


def read_timed_trace(path: Path) -> TimedTrace:
    """Reads a timed trace.

    Raises:
        TraceError: The file cannot be read, a line is wrong, or comes before the one above it, or
            more than `LONGEST_S` after the first.
    """
    requests: list[TimedRequest] = []
    sizes: dict[str, int] = {}
    for where, row in _rows(path, (*_COLUMNS, *_TOKENS)):
        time, adapter = _time(row, where), _adapter(row, where)
        if requests and time < requests[-1].arrives_s:
            raise TraceError(
                f"{where}: time {time:g} is before {requests[-1].arrives_s:g}, the time of the "
                "request above it; sort the trace by time"
            )
        if requests and time - requests[0].arrives_s > LONGEST_S:
            raise TraceError(
                f"{where}: time {time:g} is more than 2^32 seconds after "
                f"{requests[0].arrives_s:g}, the time of the first request; give times in seconds"
            )
        prompt, generation = (_positive(row, name, where) for name in _TOKENS)
        requests.append(TimedRequest(time, adapter, prompt, generation))
        if adapter is not None:
            _note_size(row, adapter, sizes, where)
    return TimedTrace(tuple(requests), sizes)


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All rows, at least one, and where each is."""
    readers = {".csv": _csv_rows, ".jsonl": _json_rows, ".ndjson": _json_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TraceError(f"{path}: a trace must end in .csv, .jsonl or .ndjson")
    is_empty = True
    try:
        for line, row in reader(path, columns):
            is_empty = False
            yield f"{path}, line {line}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error  # without the path
        raise TraceError(f"{path}: cannot be read: {why}") from error
    if is_empty:
        raise TraceError(f"{path}: contains no requests")


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(newline="", encoding=_ENCODING) as file:
        reader = csv.DictReader(file)
        lacking = [name for name in columns if name not in (reader.fieldnames or ())]
        if lacking:
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise TraceError(
                f"{path}, line 1: the header lacks {' and '.join(lacking)} (found: {found}; "
                f"expected: {', '.join(columns)} and optionally bytes)"
            )
        for row in reader:
            yield reader.line_num, row


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding=_ENCODING) as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                if text.startswith(_LOGGED):
                    continue  # half a line, of a server that was killed
                raise TraceError(f"{path}, line {line}: invalid JSON: {error}") from error
            except (ValueError, RecursionError) as error:
                raise TraceError(
                    f"{path}, line {line}: found a number of too many digits, or too deep nesting"
                ) from error
            if not isinstance(row, dict):
                raise TraceError(
                    f"{path}, line {line}: expected a JSON object, got {reprlib.repr(row)}"
                )
            if row.get(_STATUS, _ANSWERED) == _ANSWERED and "dropped" not in row:
                yield line, row


def _time(row: Mapping[str, Any], where: str) -> float:
    found = row.get("time")
    if isinstance(found, str) and _STATUS in row:
        found = _timestamp(found)
    try:
        time = math.nan if found is None or isinstance(found, bool) else float(found)
    except (TypeError, ValueError, OverflowError):
        time = math.nan
    if not math.isfinite(time):
        raise TraceError(f"{where}: time must be a finite number, got {reprlib.repr(found)}")
    return time


def _timestamp(text: str) -> float | str:
    """The seconds since 1970 of a usage log's time; what is no time as it is."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return text


def _adapter(row: Mapping[str, Any], where: str) -> str | None:
    found = row.get("adapter")
    if found is None and _STATUS in row:
        return None
    if not isinstance(found, str) or not found:
        raise TraceError(f"{where}: adapter must be a name, got {reprlib.repr(found)}")
    return found


def _positive(row: Mapping[str, Any], name: str, where: str) -> int:
    found = row.get(name)
    try:
        number = 0 if found is None or isinstance(found, bool | float) else int(found)
    except (TypeError, ValueError):
        number = 0
    if not 1 <= number < LIMIT:
        requested = "a positive integer" if number < 1 else "below 2^63"
        raise TraceError(f"{where}: {name} must be {requested}, got {reprlib.repr(found)}")
    return number


def _note_size(row: Mapping[str, Any], adapter: str, sizes: dict[str, int], where: str) -> None:
    if row.get("bytes") in (None, ""):
        return
    size = _positive(row, "bytes", where)
    if sizes.setdefault(adapter, size) != size:
        raise TraceError(
            f"{where}: adapter {adapter!r} has {size} bytes here and {sizes[adapter]} before; an "
            "adapter has one size"
        )
