"""The arena: exact, without overlap, within its budget, and empty when all is freed."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_multilora.store.memory import arena as arenas
from vllm_multilora.store.memory.arena import (
    PAGE,
    PLACE_BITS,
    Allocation,
    Arena,
    FreeRuns,
    Run,
    pages_of,
)
from vllm_multilora.store.protocol.channel import MAX_DESCRIPTORS

MIB = 1 << 20


class FakeSegments:
    """Knows which bytes exist; gives errors where the arena uses others."""

    def __init__(self, refuse_after: int | None = None) -> None:
        self.sizes: dict[int, int] = {}
        self.given_back: list[tuple[int, int, int]] = []
        self.refuse_after = refuse_after

    def create(self, number, size):
        if self.refuse_after is not None and len(self.sizes) >= self.refuse_after:
            raise OSError(24, "Too many open files")
        assert number not in self.sizes
        assert size > 0 == size % PAGE
        self.sizes[number] = size

    def close(self, number):
        del self.sizes[number]

    def give_back(self, number, offset, size):
        assert 0 <= offset < offset + size <= self.sizes[number]
        self.given_back.append((number, offset, size))


def blocks(*sizes: int) -> np.ndarray:
    return np.array(sizes, np.int64)


def spans(allocation: Allocation, sizes: np.ndarray) -> list[tuple[int, int, int]]:
    """Each block as (segment, first byte, one past the last)."""
    offsets = allocation.places & ((1 << PLACE_BITS) - 1)
    segments = [allocation.segments[k] for k in allocation.places >> PLACE_BITS]
    return [
        (number, int(at), int(at + size))
        for number, at, size in zip(segments, offsets, sizes, strict=True)
    ]


def check(arena: Arena, memory: FakeSegments, held: list[tuple[Allocation, np.ndarray]]) -> None:
    extents = sorted(
        (e.segment, e.offset, e.offset + e.size) for one, _ in held for e in one.extents
    )
    for (segment, _, end), (other, begin, _) in pairwise(extents):
        assert segment != other or end <= begin, "two extents share bytes"
    for segment, begin, end in extents:
        assert begin % PAGE == end % PAGE == 0
        assert end <= memory.sizes[segment]
    for one, sizes in held:
        own = [(e.segment, e.offset, e.offset + e.size) for e in one.extents]
        found = sorted(spans(one, sizes))
        for segment, begin, end in found:
            assert begin % 64 == 0
            assert any(s == segment and b <= begin and end <= e for s, b, e in own)
        for (s, _, end), (other, begin, _) in pairwise(found):
            assert s != other or end <= begin, "two blocks share bytes"
        assert one.held_bytes == sum(e.size for e in one.extents)
    assert arena.held == sum(one.held_bytes for one, _ in held)
    assert arena.committed == sum(memory.sizes.values())
    if arena.budget is not None:
        assert arena.held <= arena.budget
        assert arena.committed <= arena.budget


pack_sizes = st.lists(st.integers(1, 3 * PAGE // 64).map(lambda n: 64 * n), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.integers(4, 60), st.lists(st.tuples(pack_sizes, st.integers(0, 9)), max_size=40))
def test_packs_never_overlap_nor_pass_the_budget_and_nothing_leaks(budget_pages, steps):
    memory = FakeSegments()
    arena = Arena(memory, budget_pages * PAGE)
    held: list[tuple[Allocation, np.ndarray]] = []
    for sizes, which in steps:
        if which < 4 and held:
            arena.free(held.pop(which % len(held))[0])
        else:
            allocation = arena.allocate(blocks(*sizes))
            if allocation is not None:
                held.append((allocation, blocks(*sizes)))
            elif not held:
                assert pages_of(blocks(*sizes)) > budget_pages * PAGE
        check(arena, memory, held)
    for allocation, _ in held:
        arena.free(allocation)
    assert arena.held == 0
    assert len(memory.sizes) <= 1
    whole = blocks(64 * (budget_pages * PAGE // 64))
    assert arena.allocate(whole) is not None, "all of the budget is there again"


@pytest.mark.parametrize("order", [1, -1], ids=["ascending", "descending"])
def test_free_pages_of_different_segments_are_never_one_run(order):
    free = FreeRuns()
    for run in [Run(1, 0, PAGE), Run(2, PAGE, PAGE), Run(3, 2 * PAGE, PAGE)][::order]:
        assert free.add(run) == run


def test_room_is_found_as_fast_where_there_are_very_many_gaps():
    """Packs of all sizes that come and go for months leave thousands."""

    def seconds(gaps: int) -> float:
        arena = Arena(FakeSegments(), 2 * gaps * PAGE)
        packs = [arena.allocate(blocks(PAGE)) for _ in range(2 * gaps)]
        for pack in packs[::2]:
            arena.free(pack)

        def look() -> float:
            begun = time.perf_counter()
            arena.free(arena.allocate(blocks(PAGE, PAGE)))
            return time.perf_counter() - begun

        return min(look() for _ in range(20))

    assert seconds(4_000) < 10 * seconds(40)


def test_a_pack_goes_into_gaps_where_no_run_is_long_enough():
    memory = FakeSegments()
    arena = Arena(memory, 8 * PAGE)
    packs = [arena.allocate(blocks(PAGE)) for _ in range(8)]
    for pack in packs[::2]:
        arena.free(pack)
    assert arena.allocate(blocks(2 * PAGE)) is None, "a block never lies in two extents"
    sizes = blocks(PAGE - 64, 64, PAGE, 64, PAGE - 64)
    scattered = arena.allocate(sizes)
    assert len(scattered.extents) == 3
    held = [(pack, blocks(PAGE)) for pack in packs[1::2]]
    check(arena, memory, [*held, (scattered, sizes)])


def test_a_pack_lies_in_no_more_segments_than_a_message_carries(monkeypatch):
    monkeypatch.setattr(arenas, "_SMALLEST_SEGMENT", 2 * PAGE)
    monkeypatch.setattr(arenas, "_LARGEST_SEGMENT", 2 * PAGE)
    monkeypatch.setattr(arenas, "_MAX_SEGMENTS", 1000)
    count = MAX_DESCRIPTORS + 10
    arena = Arena(FakeSegments(), 2 * count * PAGE)
    packs = [arena.allocate(blocks(PAGE)) for _ in range(2 * count)]
    assert len({pack.segments for pack in packs}) == count
    for pack in packs[::2]:
        arena.free(pack)
    leaving = iter(packs[1::2])  # each leaves a segment empty
    needed = blocks(*[PAGE] * count)
    assert arena.allocate(needed) is None
    for _ in range(10):
        arena.free(next(leaving))
    assert len(arena.allocate(needed).segments) <= MAX_DESCRIPTORS


def test_a_pack_lies_in_no_more_extents_than_a_job_can_map(monkeypatch):
    monkeypatch.setattr(arenas, "_MAX_EXTENTS", 3)
    arena = Arena(FakeSegments(), 8 * PAGE)
    packs = [arena.allocate(blocks(PAGE)) for _ in range(8)]
    for pack in packs[::2]:
        arena.free(pack)
    assert arena.allocate(blocks(*[PAGE] * 4)) is None
    arena.free(packs[1])
    assert len(arena.allocate(blocks(*[PAGE] * 4)).extents) == 2


def test_segments_grow_with_the_budget_and_never_past_it():
    memory = FakeSegments()
    arena = Arena(memory, 100 * MIB)
    for _ in range(2):
        arena.allocate(blocks(MIB))
    assert list(memory.sizes.values()) == [64 * MIB]
    arena.allocate(blocks(64 * MIB - PAGE))
    assert sum(memory.sizes.values()) <= 100 * MIB


def test_gaps_are_taken_within_a_budget_that_is_smaller_than_the_segments():
    arena = Arena(FakeSegments(), 8 * PAGE)
    packs = [arena.allocate(blocks(PAGE)) for _ in range(8)]
    for pack in packs[::2]:
        arena.free(pack)
    two_pages = blocks(2944, 2944, 2304)  # and three where each is one
    arena.budget = 6 * PAGE
    assert arena.allocate(two_pages) is None
    arena.budget = 7 * PAGE
    assert arena.allocate(two_pages).held_bytes == 3 * PAGE


def test_empty_segments_make_room_for_a_larger_one_and_one_is_kept(monkeypatch):
    monkeypatch.setattr(arenas, "_SMALLEST_SEGMENT", 2 * PAGE)
    monkeypatch.setattr(arenas, "_LARGEST_SEGMENT", 2 * PAGE)
    memory = FakeSegments()
    arena = Arena(memory, 6 * PAGE)
    for pack in [arena.allocate(blocks(2 * PAGE)) for _ in range(2)]:
        arena.free(pack)
    assert list(memory.sizes.values()) == [2 * PAGE]
    assert arena.allocate(blocks(5 * PAGE)) is not None
    assert memory.sizes == {3: 5 * PAGE}  # no larger than it has to be; a number is not used again


def test_a_block_does_not_lie_beyond_what_the_budget_leaves_of_a_segment(monkeypatch):
    monkeypatch.setattr(arenas, "_SMALLEST_SEGMENT", 2 * PAGE)
    monkeypatch.setattr(arenas, "_LARGEST_SEGMENT", 2 * PAGE)
    arena = Arena(FakeSegments(), 5 * PAGE)
    assert all(arena.allocate(blocks(2 * PAGE)) is not None for _ in range(2))
    assert arena.allocate(blocks(2 * PAGE)) is None
    assert arena.allocate(blocks(PAGE)) is not None


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        (None, 256 * MIB),
        (50 * MIB, 50 * MIB),
        (100 * MIB, 64 * MIB),
        (4096 * MIB, 256 * MIB),
        (100 * 1024 * MIB, 1024 * MIB),
        (1024 * 1024 * MIB, 4096 * MIB),
    ],
    ids=["none", "small", "least", "a sixteenth", "most", "few"],
)
def test_a_segment_is_a_part_of_the_budget_that_a_worker_maps_at_once(budget, size):
    memory = FakeSegments()
    assert Arena(memory, budget).allocate(blocks(PAGE)) is not None
    assert list(memory.sizes.values()) == [size]


def test_room_without_a_budget_is_given_until_the_system_gives_none():
    arena = Arena(FakeSegments(refuse_after=1), None)
    assert arena.allocate(blocks(200 * MIB)) is not None
    with pytest.raises(OSError, match="Too many open files"):
        arena.allocate(blocks(200 * MIB))


def test_large_free_runs_are_given_back_to_the_system():
    memory = FakeSegments()
    arena = Arena(memory, 64 * MIB)
    small, large = arena.allocate(blocks(PAGE)), arena.allocate(blocks(4 * MIB))
    arena.allocate(blocks(PAGE))
    arena.free(small)
    assert not memory.given_back
    arena.free(large)
    assert [size for _, _, size in memory.given_back] == [4 * MIB + PAGE]


def test_small_runs_that_have_become_a_large_one_are_given_back():
    memory = FakeSegments()
    arena = Arena(memory, 64 * MIB)
    packs = [arena.allocate(blocks(MIB)) for _ in range(2)]
    arena.allocate(blocks(PAGE))
    for pack in packs:
        arena.free(pack)
    assert [size for _, _, size in memory.given_back] == [2 * MIB]


def test_what_is_larger_than_a_smaller_budget_is_closed_though_it_is_the_last():
    memory = FakeSegments()
    arena = Arena(memory, 64 * MIB)
    pack = arena.allocate(blocks(PAGE))
    arena.budget = 2 * PAGE
    arena.free(pack)
    assert arena.committed == 0


def test_a_smaller_budget_is_kept_to_by_closing_what_is_free():
    memory = FakeSegments()
    arena = Arena(memory, 256 * MIB)
    packs = [arena.allocate(blocks(60 * MIB)) for _ in range(4)]
    arena.budget = 64 * MIB
    for pack in packs:
        arena.free(pack)
    assert arena.allocate(blocks(64 * MIB)) is not None
    assert arena.committed <= 64 * MIB
