"""Choices on disk, so that a server that starts again need not try its kernels again.

A record is for one card, driver, set of libraries, source of the kernels, tables of their blocks
and set of layer kinds: it is found by a hash of all of these. It names the facts in plain JSON.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from multilora_kernels.cache_folder import default_cache_folder
from multilora_kernels.configs.config_table import DIRECTORY_VARIABLE
from multilora_kernels.native.trust import distrust
from multilora_kernels.trial.choices import Choice

FOLDER = "kernel-choices"
"""In the cache folder."""
_LOCK_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class RecordEntry:
    """One kind of layer.

    Attributes:
        description: The kind in words.
        layers: Names of layers of this kind.
        choice: Its kernels.
    """

    description: str
    layers: tuple[str, ...]
    choice: Choice


@dataclass(frozen=True)
class Record:
    """One trial's outcome.

    Attributes:
        facts: What it holds for: card, driver, versions, settings.
        entries: The kinds.
        written: When, in seconds since 1970.
    """

    facts: Mapping[str, str]
    entries: tuple[RecordEntry, ...]
    written: float = 0.0

    def lines(self) -> list[str]:
        """A table for people: kind, kernels, and why they are not ours throughout."""
        width = max((len(entry.description) for entry in self.entries), default=0)
        found = []
        for entry in self.entries:
            problems = "; ".join(f"{n}: {text}" for n, text in entry.choice.problems.items())
            text = f"{entry.description:{width}}  {entry.choice.describe()}"
            found.append(f"{text} ({problems})" if problems else text)
        return found


def default_folder() -> Path | None:
    """Where records are kept; None where nothing can be."""
    configured = os.environ.get("MULTILORA_CACHE_DIR")
    folder = Path(configured) if configured else default_cache_folder()
    return None if folder is None else folder / FOLDER


def path_of(folder: Path, facts: Mapping[str, str], kinds: Sequence[Any]) -> Path:
    """The file of a trial's record.

    Args:
        folder: Where records are kept.
        facts: As of `Record`.
        kinds: The kinds, as JSON takes them.
    """
    digest = source_digest(os.environ.get(DIRECTORY_VARIABLE))
    text = json.dumps([dict(facts), kinds, digest], sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


@lru_cache(maxsize=4)
def source_digest(tables: str | None) -> str:
    """A hash of sources and tables, which decide what kernels compute and how fast.

    Args:
        tables: The folder whose tables come before those of this package; None or empty: none.
    """
    root = Path(__file__).parents[1]
    found = sorted((*root.rglob("*.py"), *root.rglob("*.json")))
    found += sorted(Path(tables).glob("*.json")) if tables else []
    digest = hashlib.sha256()
    for path in found:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def load(path: Path) -> Record | None:
    """A record; None where there is none that can be read and trusted."""
    try:
        if distrust(path.parent) or distrust(path):
            return None
        fields = json.loads(path.read_text())
        entries = tuple(
            RecordEntry(each["description"], tuple(each["layers"]), _choice(each["choice"]))
            for each in fields["entries"]
        )
        return Record(fields["facts"], entries, fields["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(path: Path, record: Record) -> None:
    """Keeps a record.

    Raises:
        OSError: It cannot be written.
    """
    fields = {
        "facts": dict(record.facts),
        "written": time.time(),
        "entries": [
            {
                "description": entry.description,
                "layers": entry.layers,
                "choice": {
                    "ranges": entry.choice.ranges,
                    "problems": entry.choice.problems,
                    "microseconds": entry.choice.microseconds,
                },
            }
            for entry in record.entries
        ],
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump(fields, file, indent=1)
    Path(name).replace(path)


def latest(folder: Path, count: int) -> list[Record]:
    """The records written last, newest first."""
    found = [record for path in folder.glob("*.json") if (record := load(path)) is not None]
    return sorted(found, key=lambda record: -record.written)[:count]


@contextmanager
def one_at_a_time(path: Path, seconds: float) -> Iterator[None]:
    """Within it, no other process tries the same kernels: it waits so long for those that do.

    The workers of a server begin together, and all but the first find the first one's record.
    """
    file = None
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("w")
    deadline = time.monotonic() + seconds
    while file is not None and time.monotonic() < deadline:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(_LOCK_POLL_SECONDS)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _choice(fields: Mapping[str, Any]) -> Choice:
    times = {
        name: {int(rows): us for rows, us in by_rows.items()}
        for name, by_rows in fields["microseconds"].items()
    }
    ranges = tuple((most, name) for most, name in fields["ranges"])
    return Choice(ranges, dict(fields["problems"]), times)
