"""One process's values in a file: numbers by key, written in place, readable at any time.

The file is `prometheus_client`'s memory-mapped dictionary. All of it is allocated at the start
and it never grows: where a file system is full, writing to a mapped page that has no block yet
kills the process, and metrics must not.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, _read_all_values

from vllm_multilora.metrics.process_stamps import ProcessStamp

_HEADER_BYTES = 8
_ENTRY_OVERHEAD = 4 + 8 + 16  # length, most padding, value and timestamp

Key = tuple[str, ...]
"""A metric's name, then what tells its values apart."""


class SeriesFileFullError(OSError):
    """There is no room for another key."""


class SeriesFile:
    """The writer's end; one process, any of its threads.

    Args:
        path: The file to create.
        size: Bytes, all allocated now.

    Raises:
        OSError: It exists, or there is no room for it.
    """

    def __init__(self, path: Path, size: int) -> None:
        if path.exists():
            raise FileExistsError(f"{path} exists: this process records with this role already")
        # Under another name until it is whole: readers see all of it or nothing.
        unfinished = path.with_suffix(".new")
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            self._values = MmapedDict(str(unfinished))
            unfinished.rename(path)
        except OSError:
            unfinished.unlink()
            raise
        finally:
            os.close(descriptor)
        self._size = size
        self._used = _HEADER_BYTES
        self._known: dict[Key, str] = {}
        # Guards all of the above; held for a few memory accesses at a time.
        self.lock = threading.Lock()

    def cell(self, key: Key) -> str:
        """Makes room for a key, with the value 0; what `write` wants. Called with the lock held.

        Raises:
            SeriesFileFullError: There is none.
        """
        cell = self._known.get(key)
        if cell is None:
            cell = json.dumps(key, ensure_ascii=False)  # else a letter may take six bytes
            size = len(cell.encode()) + _ENTRY_OVERHEAD
            if self._used + size > self._size:
                raise SeriesFileFullError(f"no room for {cell} in {self._size} bytes")
            self._values.write_value(cell, 0.0, 0.0)
            self._used += size
            self._known[key] = cell
        return cell

    def write(self, cell: str, value: float) -> None:
        """Sets a value; called with the lock held."""
        self._values.write_value(cell, value, 0.0)

    def close(self) -> None:
        """Ends writing; the file stays."""
        with self.lock:
            self._values.close()


@dataclass(frozen=True)
class FileName:
    """What a file's name says of the process that writes it.

    Attributes:
        role: What the process is: `worker`, `engine` or `server`.
        engine: vLLM's number of the engine; empty for a server.
        writer: The process.
    """

    role: str
    engine: str
    writer: ProcessStamp

    SUFFIX = ".series"

    def __str__(self) -> str:
        return f"{self.role}-{self.engine}-{self.writer}{self.SUFFIX}"

    @classmethod
    def parse(cls, name: str) -> FileName:
        """The parts of a name.

        Raises:
            ValueError: It is no such name.
        """
        role, engine, *stamp = name.removesuffix(cls.SUFFIX).split("-")
        namespace, pid, started = map(int, stamp)
        return cls(role, engine, ProcessStamp(namespace, pid, started))


class UnreadableSeriesFileError(Exception):
    """A file is damaged, or not what its name promises."""


def read_series(path: Path) -> Iterator[tuple[str, float]]:
    """What a process has written so far: keys as JSON, and values.

    Raises:
        FileNotFoundError: It was removed.
        UnreadableSeriesFileError: It is damaged.
    """
    try:
        # In one read, where the library's own way makes two: what is written in between would be
        # in one part of the values and not in the other.
        for key, value, _, _ in _read_all_values(path.read_bytes()):
            yield key, value
    except (RuntimeError, ValueError, IndexError, struct.error) as error:
        raise UnreadableSeriesFileError(f"{path}: {error}") from error


def parse_key(text: str) -> Key:
    """A key from its JSON.

    Raises:
        ValueError: It is no list of strings.
    """
    key = json.loads(text)
    if not isinstance(key, Sequence) or not key or not all(isinstance(part, str) for part in key):
        raise ValueError(f"a key must be a list of strings, found {text}")
    return tuple(key)
