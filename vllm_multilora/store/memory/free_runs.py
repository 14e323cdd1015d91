"""The free pages of all segments, as runs that never touch each other."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple


class Run(NamedTuple):
    """Consecutive bytes of a segment.

    Attributes:
        segment: The segment's number.
        offset: Its first byte.
        size: Its bytes.
    """

    segment: int
    offset: int
    size: int


class FreeRuns:
    """A set of runs; those that touch are one.

    Kept by place and by size: where packs of all sizes have come and gone for long there are
    thousands, and several looks at them for each pack.
    """

    def __init__(self) -> None:
        self._by_place: list[Run] = []
        self._by_size: list[tuple[int, Run]] = []

    def __contains__(self, run: Run) -> bool:
        """Whether these bytes are a run, no more and no less."""
        at = bisect_left(self._by_place, run)
        return self._by_place[at : at + 1] == [run]

    def add(self, run: Run) -> Run:
        """Adds bytes that are free now; returns the run that they are part of."""
        at = bisect_left(self._by_place, run)
        for other in self._by_place[max(at - 1, 0) : at + 1]:  # before it, and after it
            if other.segment == run.segment and other.offset + other.size == run.offset:
                self._remove(other)
                run = Run(run.segment, other.offset, other.size + run.size)
            elif other.segment == run.segment and run.offset + run.size == other.offset:
                self._remove(other)
                run = Run(run.segment, run.offset, run.size + other.size)
        return self._insert(run)

    def take(self, run: Run, size: int) -> None:
        """Takes the first `size` bytes of a run."""
        self._remove(run)
        if size < run.size:
            self._insert(Run(run.segment, run.offset + size, run.size - size))

    def smallest(self, least: int) -> Run | None:
        """The smallest run of at least so many bytes; of equal ones the first."""
        at = bisect_left(self._by_size, (least,))
        return self._by_size[at][1] if at < len(self._by_size) else None

    def largest_first(self) -> Iterator[Run]:
        """All runs, the largest first."""
        return (run for _, run in reversed(self._by_size))

    def _insert(self, run: Run) -> Run:
        insort(self._by_place, run)
        insort(self._by_size, (run.size, run))
        return run

    def _remove(self, run: Run) -> None:
        del self._by_place[bisect_left(self._by_place, run)]
        del self._by_size[bisect_left(self._by_size, (run.size, run))]
