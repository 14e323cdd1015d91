"""A log in shared memory: one ring of entries a rank, one writer a ring, one reader for all.

```
  header │ process id of each rank │ heads: entries written by each rank │ ring 0 │ ring 1 │ …
```

A writer fills an entry's place and then raises its head. Nothing relies on the order in which
another processor sees the two: an entry counts only if its checksum and its sequence number are
right, and is looked at again later if not. The heads lie together, so that a reader with nothing
to read compares a few bytes and is done.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from dataclasses import dataclass

from vllm_multilora.cache.readiness_events import (
    ENTRY_BYTES,
    Event,
    Missed,
    MissedReason,
    decode,
    encode,
    sequence_of,
)
from vllm_multilora.errors import MultiLoRAError

_HEADER = struct.Struct("<8sIII")
_MAGIC = b"MLoRAlog"
_CACHE_LINE = 64
_WORD = 8
_PATIENCE = 16
"""Times that an entry below the head is looked at before it counts as corrupt."""


class SharedLogError(MultiLoRAError):
    """The shared log is not what was expected, or not to be used so."""


@dataclass(frozen=True)
class LogLayout:
    """Where things lie in the memory of a log; all offsets in bytes.

    Attributes:
        ranks: Number of writers.
        capacity: Entries in each rank's ring.
    """

    ranks: int
    capacity: int

    def __post_init__(self) -> None:
        for name, count in (("ranks", self.ranks), ("capacity", self.capacity)):
            if not 1 <= count < 1 << 31:
                raise ValueError(f"{name} must be at least 1 and below 2**31, got {count}")

    @property
    def writers_at(self) -> int:
        """Offset of the process ids: uint64 for each rank, 0 until it attaches."""
        return _CACHE_LINE

    @property
    def heads_at(self) -> int:
        """Offset of the numbers of entries written: uint64 for each rank."""
        return self.writers_at + _whole_lines(self.ranks * _WORD)

    @property
    def size(self) -> int:
        """Bytes of the whole log."""
        return self.entry_at(self.ranks, 0)

    def entry_at(self, rank: int, sequence: int) -> int:
        """Offset of the place of a rank's entry."""
        rings_at = self.heads_at + _whole_lines(self.ranks * _WORD)
        return rings_at + (rank * self.capacity + sequence % self.capacity) * ENTRY_BYTES

    def write_to(self, memory: mmap.mmap | bytearray) -> None:
        """Makes zeroed memory an empty log."""
        header = _HEADER.pack(_MAGIC, self.ranks, self.capacity, ENTRY_BYTES)
        memory[: len(header)] = header

    @classmethod
    def read_from(cls, memory: mmap.mmap | bytearray) -> LogLayout:
        """The layout of a log.

        Raises:
            SharedLogError: The memory holds none, or one of another version.
        """
        if len(memory) < _HEADER.size:
            raise SharedLogError(
                f"a shared log has a header of {_HEADER.size} bytes, found "
                f"{len(memory)} bytes in all"
            )
        magic, ranks, capacity, entry_bytes = _HEADER.unpack_from(memory)
        if magic != _MAGIC or entry_bytes != ENTRY_BYTES or not ranks or not capacity:
            raise SharedLogError(
                f"a shared log begins with {_MAGIC!r} and has entries of {ENTRY_BYTES} bytes, "
                f"found {magic!r} and {entry_bytes}; do all processes of the engine run the same "
                "version of vllm-multilora?"
            )
        layout = cls(ranks, capacity)
        if len(memory) != layout.size:
            raise SharedLogError(
                f"a shared log of {ranks} ranks with {capacity} entries has {layout.size} bytes, "
                f"found {len(memory)}"
            )
        return layout


class LogWriter:
    """Writes one rank's events; for all threads of one process.

    Args:
        memory: The log, which the writer owns from here: `close` closes the mapping.
        rank: Whose ring to write.

    Raises:
        SharedLogError: The memory holds no log, there is no such rank, or it has a writer.
    """

    def __init__(self, memory: mmap.mmap | bytearray, rank: int):
        self._memory = memory
        self._layout = LogLayout.read_from(memory)
        if not 0 <= rank < self._layout.ranks:
            raise SharedLogError(
                f"rank must be 0 to {self._layout.ranks - 1} in this log, got {rank}"
            )
        with words(memory, self._layout.writers_at, self._layout.ranks) as writers:
            if writers[rank]:
                raise SharedLogError(
                    f"rank {rank} is written by process {writers[rank]} already; "
                    "each rank has one writer"
                )
            writers[rank] = os.getpid()
        self._rank = rank
        self._heads = words(memory, self._layout.heads_at, self._layout.ranks)
        self._written = 0
        self._closed = False
        # Guards the ring, the head and `_written`: main thread and loader threads write.
        self._lock = threading.Lock()

    def append(self, event: Event) -> None:
        """Writes an event; it is never lost but by the reader's coming too late.

        Raises:
            ValueError: A number of the event is out of range.
            SharedLogError: The writer is closed.
        """
        with self._lock:
            if self._closed:
                raise SharedLogError(f"{event} cannot be logged: the writer is closed")
            entry = encode(event, self._written)
            at = self._layout.entry_at(self._rank, self._written)
            self._memory[at : at + len(entry)] = entry
            self._written += 1
            # One aligned store of eight bytes, which no reader sees by halves.
            self._heads[self._rank] = self._written

    def close(self) -> None:
        """Gives the memory up; may be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._heads.release()
                release(self._memory)


class LogReader:
    """Reads the events of all ranks; for one thread.

    Args:
        memory: The log.

    Raises:
        SharedLogError: The memory holds no log.
    """

    def __init__(self, memory: mmap.mmap | bytearray):
        self._memory = memory
        self._layout = LogLayout.read_from(memory)
        self._heads = words(memory, self._layout.heads_at, self._layout.ranks)
        self._next = [0] * self._layout.ranks
        self._tries = [0] * self._layout.ranks
        # The heads up to which everything has been read; empty while something is left.
        self._drained = b""

    def drain(self) -> list[tuple[int, Event | Missed]]:
        """What is new: each rank's events in the order of their writing, ranks ascending.

        A `Missed` among them says that events of that rank are lost, and comes before those that
        were written later.
        """
        heads = self._heads.tobytes()
        if heads == self._drained:
            return []
        found: list[tuple[int, Event | Missed]] = []
        all_read = True
        for rank, head in enumerate(memoryview(heads).cast("Q")):
            all_read &= self._drain_rank(rank, head, found)
        self._drained = heads if all_read else b""
        return found

    def close(self) -> None:
        """Gives the view of the memory up, not the memory."""
        self._heads.release()

    def _drain_rank(self, rank: int, head: int, found: list[tuple[int, Event | Missed]]) -> bool:
        """Reads up to a head; whether all was there."""
        if not self._next[rank] <= head <= self._next[rank] + self._layout.capacity:
            self._skip(rank, head, MissedReason.OVERFLOW, found)
        while self._next[rank] < head:
            at = self._layout.entry_at(rank, self._next[rank])
            entry = bytes(self._memory[at : at + ENTRY_BYTES])
            event = decode(entry)
            if event is not None and sequence_of(entry) == self._next[rank]:
                found.append((rank, event))
                self._next[rank] += 1
                self._tries[rank] = 0
            elif event is not None and sequence_of(entry) > self._next[rank]:
                # The writer came round meanwhile. What it has written by now may be overtaken
                # in the same way, so reading goes on where it will write next.
                self._skip(rank, self._heads[rank], MissedReason.OVERFLOW, found)
            elif self._tries[rank] < _PATIENCE:
                self._tries[rank] += 1
                return False
            else:
                self._skip(rank, self._next[rank] + 1, MissedReason.CORRUPT, found)
        return True

    def _skip(
        self,
        rank: int,
        to: int,
        reason: MissedReason,
        found: list[tuple[int, Event | Missed]],
    ) -> None:
        found.append((rank, Missed(reason)))
        self._next[rank] = to
        self._tries[rank] = 0


def words(memory: mmap.mmap | bytearray, offset: int, count: int) -> memoryview:
    """A view of memory as `count` unsigned integers of 64 bits."""
    return memoryview(memory)[offset : offset + count * _WORD].cast("Q")


def release(memory: mmap.mmap | bytearray) -> None:
    """Unmaps memory that is mapped."""
    if isinstance(memory, mmap.mmap):
        memory.close()


def _whole_lines(size: int) -> int:
    return -(-size // _CACHE_LINE) * _CACHE_LINE
