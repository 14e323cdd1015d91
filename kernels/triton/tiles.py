"""What every kernel does first: walk its share of the plan's tiles and find its rows.

A plan has one list of tiles of up to `tile_rows` rows. A kernel that works on blocks of fewer
rows cuts each tile into *parts* of `BLOCK_M` rows and numbers these units of work part by part:
all first parts, then all second parts, and so on. The header holds the rows of the longest tile,
so where no adapter has more than `BLOCK_M` tokens there are no second parts to skip over.
"""

# Constexpr parameters are upper-case, as is Triton's habit; Triton functions are not typed.
# ruff: noqa: N803
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from multilora_kernels.plan import HEADER_INTS, PLAN_LONGEST, PLAN_ROWS, PLAN_TILES, PLAN_TOKENS

_HEADER_INTS = tl.constexpr(HEADER_INTS)
_LONGEST = tl.constexpr(PLAN_LONGEST)
_ROWS = tl.constexpr(PLAN_ROWS)
_TILES = tl.constexpr(PLAN_TILES)
_TOKENS = tl.constexpr(PLAN_TOKENS)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def store_grain(h: torch.Tensor) -> int:
    """Ranks that a 16-byte store to h covers; 1 where its rows are not laid out for such stores.

    Args:
        h: of shape [..., slices, T, R], with contiguous rows.
    """
    elements = 16 // h.element_size()
    steps = h.size(-1), h.stride(-2), h.stride(-3)
    return elements if all(step % elements == 0 for step in steps) else 1


@triton.jit
def count_parts(plan, BLOCK_M: tl.constexpr):
    """Tiles of the batch, and units of work when each is cut into parts of `BLOCK_M` rows."""
    tiles = tl.load(plan + _TILES)
    return tiles, tiles * tl.cdiv(tl.load(plan + _LONGEST), BLOCK_M)


@triton.jit
def load_part(plan, part, tiles, tile_slot, max_tiles, BLOCK_M: tl.constexpr):
    """The adapter slot, the first row and the row count (may be <= 0) of one unit of work."""
    entry = plan + tile_slot + part % tiles
    skipped = part // tiles * BLOCK_M
    slot = tl.load(entry)
    start = tl.load(entry + max_tiles) + skipped
    rows = tl.load(entry + 2 * max_tiles) - skipped
    return slot.to(tl.int64), start, rows


@triton.jit
def load_tokens(plan, start, rows, tokens, BLOCK_M: tl.constexpr):
    """The tokens of up to `rows` plan rows, int64 [BLOCK_M], and which of them to work on.

    Tokens past the activations' own `tokens` are masked. 64 bits, because a long batch of wide
    rows has more than 2^31 elements.
    """
    lane = tl.arange(0, BLOCK_M)
    live = lane < rows
    token = tl.load(plan + _HEADER_INTS + start + lane, mask=live, other=0)
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
def dot(left, right, total):
    """`total + left @ right` in float32; factors of unequal types are multiplied as float32."""
    if left.dtype != right.dtype or _INTERPRETED:  # the interpreter's own bfloat16 are bare bits
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
