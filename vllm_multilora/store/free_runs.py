"""The free pages of all segments, as runs that never touch each other."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Run:
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
    """A set of runs; those that touch are one."""

    def __init__(self) -> None:
        self._by_place: list[Run] = []

    def add(self, run: Run) -> Run:
        """Adds bytes that are free now; returns the run that they are part of."""
        at = bisect_left(self._by_place, run)
        if at < len(self._by_place):
            after = self._by_place[at]
            if after.segment == run.segment and run.offset + run.size == after.offset:
                run = Run(run.segment, run.offset, run.size + after.size)
                del self._by_place[at]
        if at > 0:
            before = self._by_place[at - 1]
            if before.segment == run.segment and before.offset + before.size == run.offset:
                run = Run(run.segment, before.offset, before.size + run.size)
                del self._by_place[at - 1]
        insort(self._by_place, run)
        return run

    def take(self, run: Run, size: int) -> None:
        """Takes the first `size` bytes of a run."""
        at = bisect_left(self._by_place, run)
        if size == run.size:
            del self._by_place[at]
        else:
            self._by_place[at] = Run(run.segment, run.offset + size, run.size - size)

    def smallest(self, least: int) -> Run | None:
        """The smallest run of at least so many bytes; of equal ones the first."""
        fitting = (run for run in self._by_place if run.size >= least)
        return min(fitting, key=lambda run: run.size, default=None)

    def largest_first(self) -> list[Run]:
        """All runs, the largest first."""
        return sorted(self._by_place, key=lambda run: -run.size)
