"""What every kernel does first: take its share of the work, walk over the plan's tiles, find rows.

A plan has one list of tiles of up to `tile_rows` rows, long ones first. A kernel that works on
blocks of fewer rows cuts each tile into *parts* of `BLOCK_M` rows and numbers them: all first
parts, then all second parts, and so on. Only the first so many tiles have an n-th part, and the
header holds how many, so every number is a part with rows in it.

A part is worked on in *pieces*: slices and parts of K, or blocks of columns. All pieces of all
parts are one list, and each program takes a run of neighbours from it. What neighbours share, a
program reads once; no program is without work while there are as many pieces as programs.
"""

# Constexpr parameters are upper-case, as is Triton's habit; Triton functions are not typed.
# Tuples are put together by `+`: Triton knows no other way.
# ruff: noqa: N803, N806, RUF005
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from multilora_kernels.plan import (
    HEADER_INTS,
    PART_ROWS,
    PLAN_LONGER,
    PLAN_PARTS,
    PLAN_ROWS,
    PLAN_TILES,
    PLAN_TOKENS,
    TILE_INTS,
)

_HEADER_INTS = tl.constexpr(HEADER_INTS)
_TILE_INTS = tl.constexpr(TILE_INTS)
_PART_ROWS = tl.constexpr(PART_ROWS)
_LONGER = tl.constexpr(PLAN_LONGER)
_PARTS = tl.constexpr(PLAN_PARTS)
_ROWS = tl.constexpr(PLAN_ROWS)
_TILES = tl.constexpr(PLAN_TILES)
_TOKENS = tl.constexpr(PLAN_TOKENS)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_PLANES = tl.constexpr(8)  # of one block of h that are all asked for at once, at most
_FEW_BLOCKS = tl.constexpr(4)  # of h, whose planes the compiler may ask for all at once


def store_grain(h: torch.Tensor) -> int:
    """Ranks that a 16-byte store to h covers; 1 where its rows are not laid out for such stores.

    Args:
        h: of shape [..., slices, T, R], with contiguous rows.
    """
    elements = 16 // h.element_size()
    steps = h.size(-1), h.stride(-2), h.stride(-3)
    return elements if all(step % elements == 0 for step in steps) else 1


@triton.jit
def take_share(pieces):
    """The first and the end of this program's pieces, of so many in all."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    each = pieces // programs
    rest = pieces - each * programs
    first = program * each + tl.minimum(program, rest)
    return first, first + each + (program < rest).to(tl.int32)


@triton.jit
def load_header(plan, expected, BLOCK_M: tl.constexpr):
    """Parts of `BLOCK_M` rows over all tiles, and what `load_part` takes of the header.

    With a short batch's header comes the record of part `expected`, if it is a tile's first one. A
    program that is right about its part, as each one is where there is a piece for each, finds its
    rows without waiting for the header. In a long batch nobody is, and registers are few.
    """
    block = (BLOCK_M > 16) + (BLOCK_M > 32) + (BLOCK_M > 64) + (BLOCK_M > 128)
    parts, tiles = tl.load(plan + _PARTS + block), tl.load(plan + _TILES)
    if BLOCK_M > _PART_ROWS:
        known, slot, start, rows = tiles, tiles, tiles, tiles  # the first is asked for
    else:
        slot, start, rows = _load_record(plan, expected)
        known = tl.where(expected < tiles, expected, -1)
    return parts, (known, slot, start, rows)


@triton.jit
def load_part(plan, part, header, BLOCK_M: tl.constexpr):
    """The adapter slot (int64), the first row and the row count of a part."""
    known, slot, start, rows = header
    if BLOCK_M > _PART_ROWS:
        slot, start, rows = _find_part(plan, part, known, BLOCK_M)
    elif part != known:
        # The number of tiles is read again: to keep it would take a register of every thread.
        slot, start, rows = _find_part(plan, part, tl.load(plan + _TILES), BLOCK_M)
    return slot.to(tl.int64), start, rows


@triton.jit
def _find_part(plan, part, tiles, BLOCK_M: tl.constexpr):
    """The slot, the first row and the row count of a part."""
    tile, skipped, reached = part, part * 0, tiles
    while tile >= reached:
        tile -= reached
        skipped += BLOCK_M
        reached = tl.load(plan + _LONGER + skipped // _PART_ROWS)
    slot, start, rows = _load_record(plan, tile)
    return slot, start + skipped, rows - skipped


@triton.jit
def _load_record(plan, tile):
    """The slot, the first row and the rows of a tile, from the 16 bytes of its record."""
    record = plan + _HEADER_INTS + tile * _TILE_INTS
    return tl.load(record), tl.load(record + 1), tl.load(record + 2)


@triton.jit
def load_tokens(plan, order, start, rows, tokens, BLOCK_M: tl.constexpr):
    """The tokens of up to `rows` plan rows, int64 [BLOCK_M], and which of them to work on.

    `order` is where the plan's order of tokens begins in it. Tokens past the activations' own
    `tokens` are masked. 64 bits, because a long batch of wide rows has more than 2^31 elements.
    """
    lane = tl.arange(0, BLOCK_M)
    live = lane < rows
    token = tl.load(plan + order + start + lane, mask=live, other=0)
    return token.to(tl.int64), live & (token < tokens)


@triton.jit
def base_rows(plan):
    """Where the rows without an adapter lie in the plan's order: first row, count."""
    adapted = tl.load(plan + _ROWS)
    return adapted, tl.load(plan + _TOKENS) - adapted


@triton.jit
def round_up(rank, GRAIN: tl.constexpr):
    """The rank as a mask sees it: up to the next multiple of `GRAIN`.

    A mask that may end at any column would break every 16-byte load or store into single elements.
    So they go on to the end of the 16 bytes, inside the row, and who reads drops the excess.
    """
    return tl.cdiv(rank, GRAIN) * GRAIN


@triton.jit
def sum_planes(
    h,  # pointers to the rows' first column in the first plane, [BLOCK_M]
    live,
    rank,
    tokens,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`sum(planes)`, in ascending order of the planes.

    Returns a tuple of BLOCKS neighbouring blocks of columns, each float32 [BLOCK_M, BLOCK].
    """
    at = h[:, None] + tl.arange(0, BLOCK)[None, :]
    H_GRAIN: tl.constexpr = 128 // h.dtype.element_ty.primitive_bitwidth
    GRAIN: tl.constexpr = H_GRAIN if R % H_GRAIN == 0 else 1
    totals = ()
    for i in tl.static_range(BLOCKS):
        block = _load_plane(at + i * BLOCK, live, rank - i * BLOCK, GRAIN, BLOCK)
        totals = totals + (block,)  # type: ignore[assignment]
    plane = tokens.to(tl.int64) * (SLICES * R)
    # Pipelining these loops would keep a copy of the planes in shared memory for nothing.
    if GRAIN > 1 and SPLIT_K <= _PLANES and BLOCKS == 1:
        for _ in tl.range(1, SPLIT_K, num_stages=1):
            at += plane
            totals = _add_plane(totals, at, live, rank, GRAIN, BLOCK, BLOCKS)
    else:
        GROUP: tl.constexpr = _group(GRAIN, h.shape[0], BLOCKS)
        end = rank * 0 + SPLIT_K  # a tensor in the interpreter, too
        FEW: tl.constexpr = SPLIT_K <= _PLANES and h.shape[0] <= 16
        if BLOCKS > _FEW_BLOCKS or (FEW and BLOCKS == _FEW_BLOCKS):
            # The compiler must not see how few groups there are, or it asks for all planes at
            # once and has no registers for them. It does not know that there are tokens.
            end = tl.minimum(tokens, 1) * SPLIT_K
        for first in tl.range(1, end, GROUP, num_stages=1):
            for i in tl.static_range(GROUP):
                at += plane
                there = tl.where(first + i < SPLIT_K, rank, 0)
                totals = _add_plane(totals, at, live, there, GRAIN, BLOCK, BLOCKS)
    return totals


@triton.constexpr_function
def _group(grain, rows, blocks):
    """Planes that are asked for at once: fewer of several blocks, for registers are few.

    Loads of single elements take more by themselves.
    """
    if grain == 1:
        return 1
    return 6 if blocks == 1 else max(1, (8 if rows <= 16 else 4) // blocks)


@triton.jit
def _add_plane(
    totals,
    at,
    live,
    rank,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    sums = ()
    for i in tl.static_range(BLOCKS):
        block = _load_plane(at + i * BLOCK, live, rank - i * BLOCK, GRAIN, BLOCK)
        sums = sums + (totals[i] + block,)  # type: ignore[assignment]
    return sums


@triton.jit
def _load_plane(at, live, rank, GRAIN: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a plane as float32, to the end of the 16 bytes in which the rank ends."""
    mask = live[:, None] & (tl.arange(0, BLOCK) < round_up(rank, GRAIN))[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def dot(left, right, total):
    """`total + left @ right` in float32; factors of unequal types are multiplied as float32."""
    if left.dtype != right.dtype or _INTERPRETED:  # the interpreter's own bfloat16 are bare bits
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
