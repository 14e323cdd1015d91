"""The log through which ranks tell their engine which adapters they have ready.

The engine makes it before its workers start and gives them its path; each worker opens a
`LogWriter` with `attach_writer`; the engine seals the log once all have, and drains it each step.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from vllm_multilora.cache.readiness_events import Event, Missed
from vllm_multilora.cache.shared_log import (
    LogLayout,
    LogReader,
    LogWriter,
    SharedLogError,
    release,
    words,
)
from vllm_multilora.cache.shared_segment import (
    create_segment,
    open_segment,
    remove_stale_segments,
    segment_folder,
)

CAPACITY = 256
"""Entries in a rank's ring (96 KiB): what the ranks may say between two steps of the engine."""


class ReadinessLog:
    """An engine's end of the log; removes what engines that crashed have left.

    Args:
        instance_id: The engine instance; tells its log from others of this process.
        ranks: Number of workers that will write.
        capacity: Entries in each rank's ring. A rank that writes more between two drains loses
            events, which `drain` tells of.
        folder: Where the log lives until it is sealed; by default, in shared memory.

    Raises:
        SharedSegmentError: The log cannot be created.
        ValueError: Ranks or capacity are out of range.

    Attributes:
        path: What workers pass to `attach_writer`.
    """

    def __init__(
        self,
        instance_id: str,
        ranks: int,
        *,
        capacity: int = CAPACITY,
        folder: Path | None = None,
    ):
        folder = segment_folder() if folder is None else folder
        self._layout = LogLayout(ranks, capacity)
        remove_stale_segments(folder)
        self.path, self._memory = create_segment(instance_id, self._layout.size, folder)
        # Also runs when the process ends without `close`.
        self._remove_name = weakref.finalize(self, _unlink, self.path, os.getpid())
        self._layout.write_to(self._memory)
        self._reader = LogReader(self._memory)
        self._closed = False

    def missing_ranks(self) -> list[int]:
        """The ranks that have not attached yet, ascending."""
        with words(self._memory, self._layout.writers_at, self._layout.ranks) as writers:
            return [rank for rank, process in enumerate(writers) if not process]

    def seal(self) -> None:
        """Removes the log's name: nobody else can attach, and nothing is left however it ends.

        Raises:
            SharedLogError: Some rank has not attached; the name stays.
        """
        missing = self.missing_ranks()
        if missing:
            raise SharedLogError(
                f"{self.path} cannot be sealed: rank{'s' if len(missing) > 1 else ''} "
                f"{', '.join(map(str, missing))} of {self._layout.ranks} must attach first"
            )
        self._remove_name()

    def drain(self) -> list[tuple[int, Event | Missed]]:
        """What is new; see `LogReader.drain`."""
        return self._reader.drain()

    def close(self) -> None:
        """Gives the memory up and removes the name, sealed or not; may be called again."""
        self._remove_name()
        if not self._closed:
            self._closed = True
            self._reader.close()
            release(self._memory)


def attach_writer(path: Path, rank: int) -> LogWriter:
    """A worker's end of the log.

    Args:
        path: The engine's `ReadinessLog.path`.
        rank: Which worker this is, counted from 0.

    Raises:
        SharedSegmentError: There is no such file, or it is not this user's.
        SharedLogError: It is no log of this version, lacks the rank, or has a writer for it.
    """
    memory = open_segment(path)
    try:
        return LogWriter(memory, rank)
    except SharedLogError:
        memory.close()
        raise


def _unlink(path: Path, creator: int) -> None:
    # Not in a forked child, which has the creator's finalizers too.
    if os.getpid() == creator:
        path.unlink(missing_ok=True)
