"""Host memory for packed adapters: segments, cut into pages, with every byte accounted for."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_multilora.store.memory.segments import SharedSegments
from vllm_multilora.store.protocol.channel import MAX_DESCRIPTORS

PAGE = 4096
PLACE_BITS = 40
"""A block's place is `(index of the segment among the pack's << PLACE_BITS) | offset`."""
OFFSET_MASK = (1 << PLACE_BITS) - 1

_SMALLEST_SEGMENT = 64 << 20
_LARGEST_SEGMENT = 1 << 30
_MAX_SEGMENTS = 256  # each is a descriptor, here and in every worker
_MAX_EXTENTS = 1 << 14  # each is a mapping in the pack's job; Linux allows 65,530
_GIVEN_BACK = 2 << 20  # free runs of this many bytes go back to the system


class Run(NamedTuple):
    """Consecutive bytes of a segment."""

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


@dataclass(frozen=True)
class Allocation:
    """Where a pack's blocks lie.

    Attributes:
        extents: Its pages, whole ones; no two packs share one.
        segments: Numbers of the segments; places refer to them by their index here.
        places: int64 [n], each block's place.
        held_bytes: Bytes of all its pages.
    """

    extents: tuple[Run, ...]
    segments: tuple[int, ...]
    places: NDArray[np.int64]
    held_bytes: int


@dataclass(frozen=True)
class _Part:
    """Blocks [first, last) go to the beginning of a run, and take `size` bytes of it."""

    run: Run
    first: int
    last: int
    size: int


class Arena:
    """Places packs in segments, never more bytes than the budget (None: no limit).

    The segments together are never larger than the budget either, so that a device that pins them
    whole takes no more than that.
    """

    def __init__(self, memory: SharedSegments, budget: int | None, first_segment: int = 1) -> None:
        self._memory = memory
        self._free = FreeRuns()
        self._sizes: dict[int, int] = {}
        self._next_segment = first_segment
        self.budget = budget
        self.held = 0
        """Bytes of the pages of all packs."""

    @property
    def committed(self) -> int:
        """Bytes of all segments."""
        return sum(self._sizes.values())

    def allocate(self, block_bytes: NDArray[np.int64]) -> Allocation | None:
        """Finds room for blocks, in as few extents as it can, and as many as a job can map.

        Args:
            block_bytes: int64 [n], bytes of each block, positive multiples of 64.

        Returns:
            Where they lie; None if there is no room now.

        Raises:
            OSError: The system gives no segment.
        """
        ends = np.cumsum(block_bytes)
        parts = self._one_run(pages_of(block_bytes), len(ends)) or self._scattered(ends)
        if parts is None:
            return None
        if self.budget is not None and self.held + sum(p.size for p in parts) > self.budget:
            return None
        return self._take(parts, block_bytes, ends)

    def free(self, allocation: Allocation) -> None:
        self.held -= allocation.held_bytes
        for extent in allocation.extents:
            run = self._free.add(extent)
            if run.size >= _GIVEN_BACK:
                self._memory.give_back(run.segment, run.offset, run.size)
        self._close_empty(spare=1)

    def give_back_free(self) -> None:
        """Gives the pages of all free runs back to the system, which has used its memory up."""
        for run in self._free.largest_first():
            self._memory.give_back(run.segment, run.offset, run.size)

    def _one_run(self, needed: int, count: int) -> list[_Part] | None:
        """The whole pack in one run: the smallest that is large enough, or a new segment's."""
        run = self._free.smallest(needed) or self._new_segment(needed)
        if run is None and self._close_empty(spare=0):
            run = self._new_segment(needed)
        return [_Part(run, 0, count, needed)] if run else None

    def _scattered(self, ends: NDArray[np.int64]) -> list[_Part] | None:
        """The blocks in several runs, the largest first; what budget is left is one more."""
        assert self.budget is not None, "without one, a new segment has room for any pack"
        self._new_segment((self.budget - self.committed) // PAGE * PAGE)
        parts: list[_Part] = []
        first, begin = 0, 0
        for run in self._free.largest_first():
            last = int(np.searchsorted(ends, begin + run.size, side="right"))
            if last == first:
                break  # the other runs are no larger
            size = _pages(int(ends[last - 1]) - begin)
            parts.append(_Part(run, first, last, size))
            first, begin = last, int(ends[last - 1])
            if first == len(ends):
                segments = {part.run.segment for part in parts}
                can_be_mapped = len(segments) <= MAX_DESCRIPTORS and len(parts) <= _MAX_EXTENTS
                return parts if can_be_mapped else None
        return None

    def _take(
        self, parts: list[_Part], block_bytes: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> Allocation:
        segments = tuple(dict.fromkeys(part.run.segment for part in parts))
        places = np.empty(len(ends), np.int64)
        starts = ends - block_bytes
        extents = []
        for part in parts:
            segment, offset = part.run.segment, part.run.offset
            extents.append(Run(segment, offset, part.size))
            inside = starts[part.first : part.last] - starts[part.first] + offset
            places[part.first : part.last] = (segments.index(segment) << PLACE_BITS) | inside
            self._free.take(part.run, part.size)
        held = sum(extent.size for extent in extents)
        self.held += held
        return Allocation(tuple(extents), segments, places, held)

    def _new_segment(self, least: int) -> Run | None:
        """A new segment's run, of at least so many bytes; None where the budget does not allow."""
        size = max(least, self._usual_size())
        if self.budget is not None:
            size = min(size, (self.budget - self.committed) // PAGE * PAGE)
        if size < max(least, PAGE):
            return None
        number = self._next_segment
        self._memory.create(number, size)
        self._next_segment += 1
        self._sizes[number] = size
        return self._free.add(Run(number, 0, size))

    def _usual_size(self) -> int:
        if self.budget is None:
            return _LARGEST_SEGMENT // 4
        size = min(max(self.budget // 16, _SMALLEST_SEGMENT), _LARGEST_SEGMENT)
        return _pages(max(size, self.budget // _MAX_SEGMENTS))

    def _close_empty(self, spare: int) -> bool:
        """Closes segments that hold nothing, but for so many of them; whether any was closed."""
        whole = (Run(number, 0, size) for number, size in self._sizes.items())
        empty = [run for run in whole if run in self._free]
        over = self.budget is not None and self.committed > self.budget
        closed = empty if over else empty[spare:]
        for run in closed:
            self._free.take(run, run.size)
            del self._sizes[run.segment]
            self._memory.close(run.segment)
        return bool(closed)


def pages_of(block_bytes: NDArray[np.int64]) -> int:
    """Bytes of the pages that blocks take in one extent."""
    return _pages(int(block_bytes.sum()))


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
