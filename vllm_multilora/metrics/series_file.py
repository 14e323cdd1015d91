"""One process's values in a file: numbers by key, written in place, readable at any time.

The file is `prometheus_client`'s memory-mapped dictionary. All of it is allocated at the start
and it never grows: where a file system is full, writing to a mapped page that has no block yet
kills the process, and metrics must not.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, _read_all_values

from vllm_multilora.metrics.value_folder import locked

_HEADER_BYTES = 8
_ENTRY_OVERHEAD = 4 + 8 + 16  # length, most padding, value and timestamp
_SEPARATOR = "\x1f"  # cannot be printed, and so is in no label
_DEAD_STATES = ("Z", "X")

Key = tuple[str, ...]
"""A metric's name, then what tells its values apart."""


@dataclass(frozen=True)
class ProcessStamp:
    """Which process it was.

    Attributes:
        namespace: The inode of its namespace of process ids; 0 where there is no /proc.
        started: When it started, in clock ticks since the machine did; 0 where there is no /proc.
    """

    namespace: int
    pid: int
    started: int

    @classmethod
    def own(cls) -> ProcessStamp:
        pid = os.getpid()
        return cls(_namespace(), pid, start_time(pid) or 0)

    def is_dead(self) -> bool:
        """Whether the process is known to have ended.

        Nothing can be known of processes in another namespace (containers may share `/dev/shm`),
        or where there is no /proc.
        """
        return (
            start_time(os.getpid()) is not None
            and self.namespace == _namespace()
            and start_time(self.pid) != self.started
        )

    def __str__(self) -> str:
        return f"{self.namespace}-{self.pid}-{self.started}"


def _namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except FileNotFoundError:
        return 0


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None: it is dead."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name, in parentheses, may hold anything; the fields are counted after it.
    fields = facts[facts.rindex(b")") + 2 :].split()
    return None if fields[0].decode() in _DEAD_STATES else int(fields[19])


_NOBODY = ProcessStamp(0, 0, 0)


class SeriesFileFullError(OSError):
    """There is no room for another key."""


class SeriesFile:
    """The writer's end, all bytes allocated at once; any thread of a process; raises `OSError`."""

    def __init__(self, path: Path, size: int) -> None:
        if path.exists():
            raise FileExistsError(f"{path} exists: this process records with this role already")
        self._path = path
        self._size = size
        self._used = _HEADER_BYTES
        self._known: dict[Key, str] = {}
        self._values = _prepared(path, size, {})
        _unfinished(path).rename(path)
        # Guards all of the above; held for a few memory accesses, or while the file is made anew.
        self.lock = threading.Lock()

    def cell(self, key: Key) -> str:
        """Makes room for a key, with the value 0, under lock; raises `SeriesFileFullError`."""
        cell = self._known.get(key)
        if cell is None:
            cell = _SEPARATOR.join(key)
            size = _size_of(cell)
            if self._used + size > self._size:
                raise SeriesFileFullError(f"no room for {cell} in {self._size} bytes")
            self._values.write_value(cell, 0.0, 0.0)
            self._used += size
            self._known[key] = cell
        return cell

    def remove(self, keys: Iterable[Key]) -> None:
        """Writes the file anew without some of its keys; called with the lock held.

        Shown is the sum of all processes' files. One that falls looks like a restart to Prometheus,
        which takes all that is left of it for new. So as long as another process has a key, what
        was counted under it here still counts, in a file that belongs to nobody.

        Raises:
            OSError: That cannot be done now; nothing has changed.
            UnreadableSeriesFileError: Likewise.
        """
        removed = {key: cell for key in keys if (cell := self._known.get(key)) is not None}
        name = FileName.parse(self._path.name)
        nobodys = self._path.with_name(str(replace(name, writer=_NOBODY)))
        with locked(self._path.parent, exclusively=True):
            own = dict(read_series(self._path))
            paths = self._path.parent.glob(f"{name.role}-{name.engine}-*{FileName.SUFFIX}")
            others = {path: dict(read_series(path)) for path in paths if path != self._path}
            left = others.pop(nobodys, {})
            left = {next(iter(own)): 0.0, **left}  # the first is what all are labelled with
            for cell in removed.values():
                left[cell] = left.get(cell, 0.0) + own.pop(cell)
            still_shown = set(own).union(*others.values())
            left = {cell: value for cell, value in left.items() if cell in still_shown}
            values = _prepared(self._path, self._size, own)
            if len(left) > 1 or nobodys.exists():
                _prepared(nobodys, _HEADER_BYTES + sum(map(_size_of, left)), left).close()
                _unfinished(nobodys).rename(nobodys)
            _unfinished(self._path).rename(self._path)
        self._values.close()
        self._values = values
        for key, cell in removed.items():
            del self._known[key]
            self._used -= _size_of(cell)

    def write(self, cell: str, value: float) -> None:
        """Sets a value; called with the lock held."""
        self._values.write_value(cell, value, 0.0)

    def close(self) -> None:
        """Ends writing; the file stays."""
        with self.lock:
            self._values.close()


def _size_of(cell: str) -> int:
    return len(cell.encode()) + _ENTRY_OVERHEAD


def _unfinished(path: Path) -> Path:
    """What a file is called until it is whole: readers see all of it or nothing."""
    return path.with_suffix(".new")


def _prepared(path: Path, size: int, values: Mapping[str, float]) -> MmapedDict:
    """A file with these values that has yet to get its name."""
    unfinished = _unfinished(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    descriptor = os.open(unfinished, flags, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
        prepared = MmapedDict(str(unfinished))
    except OSError:
        unfinished.unlink()
        raise
    finally:
        os.close(descriptor)
    for cell, value in values.items():
        prepared.write_value(cell, value, 0.0)
    return prepared


@dataclass(frozen=True)
class FileName:
    """What a file's name says of the process that writes it.

    Attributes:
        role: What the process is: `worker`, `engine` or `server`.
        engine: vLLM's number of the engine; empty for a server.
    """

    role: str
    engine: str
    writer: ProcessStamp

    SUFFIX = ".series"

    def __str__(self) -> str:
        return f"{self.role}-{self.engine}-{self.writer}{self.SUFFIX}"

    @classmethod
    def parse(cls, name: str) -> FileName:
        """The parts of a name; raises `ValueError` for any other."""
        role, engine, *stamp = name.removesuffix(cls.SUFFIX).split("-")
        namespace, pid, started = map(int, stamp)
        return cls(role, engine, ProcessStamp(namespace, pid, started))


class UnreadableSeriesFileError(Exception):
    """A file is damaged, or not what its name promises."""


def read_series(path: Path) -> Iterator[tuple[str, float]]:
    """What a process has written so far: keys' texts, and values.

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
    return tuple(text.split(_SEPARATOR))
