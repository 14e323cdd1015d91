"""The second half, `y += h @ B.T`: a block of tokens against a block of one slice's columns.

The grid's first axis runs over the column blocks of all slices, one slice after the other, so a
narrow slice (k and v under grouped-query attention) brings only the blocks that it has. A program
adds up the planes of `h` from a split product, always in the same order, on its way; in a long
batch `combine` may have done so before, since all column blocks need the same sum.
"""

# Constexpr parameters are upper-case, as is Triton's habit; Triton functions are not typed.
# ruff: noqa: N803, N806
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from multilora_kernels.configs import MIN_BLOCK, ExpandConfig
from multilora_kernels.factors import OutputFactors
from multilora_kernels.triton.combine import pays_before_expand, prepare_combine
from multilora_kernels.triton.launch import Batch, Launch, launch_options
from multilora_kernels.triton.shrink import kept_type
from multilora_kernels.triton.tiles import (
    base_rows,
    count_parts,
    dot,
    load_part,
    load_tokens,
    round_up,
)

_MIN_BLOCK = tl.constexpr(MIN_BLOCK)


def prepare_expand(
    y: torch.Tensor,
    planes: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    batch: Batch,
    offset: int,
    add_inputs: bool,
    config: ExpandConfig,
    *,
    after_shrink: bool,
    factors: OutputFactors | None = None,
) -> Launch:
    """The launch for all slices, to be run; it may bring one that adds up the planes before it.

    Args:
        y: of shape [T, W], changed in place.
        planes: of shape [parts of K, slices, T, R], contiguous; its sum over the first dimension
            is what B is multiplied by.
        lora_b: As for `multilora_kernels.lora_expand`.
        batch: The batch.
        offset: First column of y.
        add_inputs: If False, overwrite.
        config: The blocks.
        after_shrink: Whether `shrink` is what was launched just before, so that this launch may
            overlap with its end, and `planes` are what it returned.
        factors: Of y's columns; None: none, and the kernel knows nothing of them.
    """
    tokens = y.size(0)
    block_m = batch.rows_per_program(config.block_m)
    widths = tuple(b.size(-2) for b in lora_b)
    programs = sum(triton.cdiv(width, config.block_n) for width in widths)
    pdl = batch.facts.pdl and after_shrink
    before = None
    kept = kept_type(y, lora_b)
    if after_shrink and pays_before_expand(planes, programs, kept):
        h = torch.empty(planes.shape[1:], dtype=kept, device=planes.device)
        before = prepare_combine(h, planes, batch, zeros=False)
        planes = h.unsqueeze(0)
    return Launch(
        expand_kernel,
        (programs, batch.lanes(programs, tokens, block_m)),
        {
            "y": y,
            "planes": planes,
            "b_slices": tuple(lora_b),
            "offset": offset,
            "y_row": y.stride(0),
            **batch.arguments(tokens),
            **({} if factors is None else _tensors_of(factors)),
        },
        {
            "B_SLOT": tuple(b.stride(0) for b in lora_b),
            "B_ROW": tuple(b.stride(-2) for b in lora_b),
            "B_COLUMN": tuple(b.stride(-1) for b in lora_b),
            "WIDTHS": widths,
            "R": planes.size(-1),
            "GRAIN": grain(lora_b, planes.size(-1)),
            "SPLIT_K": planes.size(0),
            "OVERWRITE": not add_inputs,
            "BLOCK_M": block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": config.block_r,
            "PDL": pdl,
            **({} if factors is None else _steps_of(factors)),
        },
        launch_options(config.num_warps, config.num_stages, pdl=pdl),
        before,
    )


def _tensors_of(factors: OutputFactors) -> dict[str, torch.Tensor | None]:
    return {"factors": factors.values, "marks": factors.marks, "bias": factors.bias}


def _steps_of(factors: OutputFactors) -> dict[str, int]:
    return {"FACTORS_SLOT": factors.values.stride(0), "MARKS_SLICE": factors.marks.stride(0)}


def grain(lora_b: Sequence[torch.Tensor], max_rank: int) -> int:
    """Ranks that a 16-byte load of a row of B covers; 1 where rows are not laid out for such loads.

    With contiguous columns a load lies within one rank, and nothing has to be rounded.
    """
    elements = 16 // lora_b[0].element_size()
    aligned = all(
        b.stride(-1) == 1 and b.stride(-2) % elements == 0 and b.stride(0) % elements == 0
        for b in lora_b
    )
    return elements if aligned and max_rank % elements == 0 else 1


@triton.jit(
    do_not_specialize=["tokens", "tile_slot", "max_tiles"],
    # A layer's ranks are some rows of a table: where they begin must not make another kernel.
    do_not_specialize_on_alignment=["ranks", "factors", "marks"],
)
def expand_kernel(
    y,  # [tokens, >= offset + sum(WIDTHS)]
    planes,  # [SPLIT_K, slices, tokens, R]
    b_slices,  # per slice [slots, width, R]
    ranks,  # int32 [slices, slots]
    plan,
    tokens,
    tile_slot,
    max_tiles,
    offset,
    y_row,
    ranks_slice,
    ranks_slot,
    B_SLOT: tl.constexpr,  # per slice, elements from slot to slot
    B_ROW: tl.constexpr,  # per slice, elements from row to row
    B_COLUMN: tl.constexpr,  # per slice, elements from column to column
    WIDTHS: tl.constexpr,  # per slice, columns of y
    R: tl.constexpr,
    GRAIN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OVERWRITE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
    factors=None,  # float32 [slots, sum(WIDTHS)]
    marks=None,  # int32 [slices, slots]
    bias=None,  # float32 [sum(WIDTHS)]
    FACTORS_SLOT: tl.constexpr = 0,
    MARKS_SLICE: tl.constexpr = 0,
):
    """Grid: (column blocks of all slices, lanes); a lane does every lanes-th unit of work."""
    # Which slice this program's column block lies in, and where the slice begins in y.
    block = tl.program_id(0)
    slice_id = block * 0
    width = slice_id + WIDTHS[0]
    before = slice_id  # columns of the slices before
    y += offset
    for i in tl.static_range(1, len(WIDTHS)):
        blocks = tl.cdiv(WIDTHS[i - 1], BLOCK_N)
        if (slice_id == i - 1) & (block >= blocks):
            slice_id += 1
            block -= blocks
            width += WIDTHS[i] - WIDTHS[i - 1]
            y += WIDTHS[i - 1]
            before += WIDTHS[i - 1]
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    y += column
    tiles, parts = count_parts(plan, BLOCK_M)
    for part in tl.range(tl.program_id(1), parts, tl.num_programs(1), num_stages=1):
        slot, start, rows = load_part(plan, part, tiles, tile_slot, max_tiles, BLOCK_M)
        rank = tl.load(ranks + slice_id * ranks_slice + slot * ranks_slot)
        if (rows > 0) & (rank > 0):
            token, live = load_tokens(plan, start, rows, tokens, BLOCK_M)
            b = b_slices[0] + slot * B_SLOT[0]
            b_row = B_ROW[0]
            b_column = B_COLUMN[0]
            for i in tl.static_range(1, len(WIDTHS)):
                if slice_id == i:
                    b = b_slices[i] + slot * B_SLOT[i]
                if B_ROW[i] != B_ROW[0]:
                    b_row = tl.where(slice_id == i, B_ROW[i], b_row)
                if B_COLUMN[i] != B_COLUMN[0]:
                    b_column = tl.where(slice_id == i, B_COLUMN[i], b_column)
            factor, kept, is_marked = None, None, 0
            if factors is not None:
                is_marked = tl.load(marks + slice_id * MARKS_SLICE + slot)
                factor = factors + slot * FACTORS_SLOT + before + column
                if bias is not None:
                    kept = bias + before + column
            # As in the first half: one body per power of two up to BLOCK_R.
            for halvings in tl.static_range(0, 8):
                if BLOCK_R >> halvings >= _MIN_BLOCK:
                    _expand_block(
                        y[None, :] + (token * y_row)[:, None],
                        planes + (slice_id.to(tl.int64) * tokens + token) * R,
                        b + column.to(tl.int64) * b_row,
                        b_column,
                        factor,
                        kept,
                        is_marked,
                        live,
                        inside,
                        rank,
                        tokens,
                        len(WIDTHS),
                        R,
                        GRAIN,
                        SPLIT_K,
                        OVERWRITE,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_R,
                        BLOCK_R >> halvings,
                        PDL,
                    )
        elif OVERWRITE:
            _store_zeros(y, y_row, plan, start, rows, tokens, inside, BLOCK_M, BLOCK_N)
    if OVERWRITE:
        first, count = base_rows(plan)
        for done in tl.range(
            tl.program_id(1) * BLOCK_M, count, tl.num_programs(1) * BLOCK_M, num_stages=1
        ):
            _store_zeros(
                y, y_row, plan, first + done, count - done, tokens, inside, BLOCK_M, BLOCK_N
            )
    if PDL:
        # Programs without work wait too: a kernel launched next waits for this one only, and
        # must find the first half ended as well.
        tl.extra.cuda.gdc_wait()


@triton.jit
def _expand_block(
    y,  # pointers, [BLOCK_M, BLOCK_N]
    h,  # pointers to the rows in the first plane, [BLOCK_M]
    b,  # pointers to the rows, [BLOCK_N]
    b_column,
    factor,  # pointers, [BLOCK_N]; None: the slot has none
    kept,  # pointers to what is not multiplied, [BLOCK_N]; None: nothing
    is_marked,  # whether the factors count
    live,
    inside,
    rank,
    tokens,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    GRAIN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OVERWRITE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`y += sum(planes)[:, :rank] @ b[:, :rank].T`, if BLOCK is the one for this rank."""
    HALF: tl.constexpr = BLOCK // 2 if BLOCK > _MIN_BLOCK else 0
    OUT: tl.constexpr = y.dtype.element_ty
    short = tl.minimum(rank, BLOCK_R)
    if (short > HALF) & (short <= BLOCK):
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        product = _add_product(
            product,
            h,
            b,
            b_column,
            0,
            live,
            inside,
            rank,
            tokens,
            SLICES,
            R,
            GRAIN,
            SPLIT_K,
            BLOCK,
            OUT,
            PDL,
        )
        if (R > BLOCK_R) & (BLOCK == BLOCK_R):
            for first in range(BLOCK, rank, BLOCK):
                product = _add_product(
                    product,
                    h,
                    b,
                    b_column,
                    first,
                    live,
                    inside,
                    rank,
                    tokens,
                    SLICES,
                    R,
                    GRAIN,
                    SPLIT_K,
                    BLOCK,
                    OUT,
                    False,  # the first block has waited
                )
        mask = live[:, None] & inside[None, :]
        if not OVERWRITE:
            product += tl.load(y, mask=mask, other=0.0).to(tl.float32)
        if factor is not None:  # noqa: SIM102 (known when it is compiled)
            if is_marked != 0:
                grown = product
                if kept is not None:
                    grown -= tl.load(kept, mask=inside, other=0.0)[None, :]
                product += tl.load(factor, mask=inside, other=0.0)[None, :] * grown
        tl.store(y, product.to(OUT), mask=mask)


@triton.jit
def _add_product(
    product,
    h,
    b,
    b_column,
    first,
    live,
    inside,
    rank,
    tokens,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    GRAIN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    OUT: tl.constexpr,
    PDL: tl.constexpr,
):
    """`product + sum(planes)[:, first:first + BLOCK] @ b[:, first:first + BLOCK].T`."""
    r = first + tl.arange(0, BLOCK)
    b_block = b[None, :] + r[:, None] * b_column
    b_mask = inside[None, :] & (r < round_up(rank, GRAIN))[:, None]
    weights = tl.load(b_block, mask=b_mask, other=0.0)
    if PDL:
        # Returns when the first half has ended and its stores are visible. All that came before,
        # the weights included, was loaded while it still ran.
        tl.extra.cuda.gdc_wait()
    h_block = h[:, None] + r[None, :]
    H_GRAIN: tl.constexpr = 128 // h.dtype.element_ty.primitive_bitwidth
    h_mask = live[:, None] & (r < round_up(rank, H_GRAIN if R % H_GRAIN == 0 else 1))[None, :]
    total = tl.load(h_block, mask=h_mask, other=0.0).to(tl.float32)
    # Pipelining this loop would keep a copy of the planes in shared memory for nothing.
    for _ in tl.range(1, SPLIT_K, num_stages=1):
        h_block += tokens.to(tl.int64) * (SLICES * R)
        total += tl.load(h_block, mask=h_mask, other=0.0)
    # Past the rank lies whatever the memory held, even NaN: both factors must be zero there.
    total = tl.where(r[None, :] < rank, total, 0.0)
    weights = tl.where(r[:, None] < rank, weights, 0.0)
    if weights.dtype == OUT:
        total = total.to(OUT)
    return dot(total, weights, product)


@triton.jit
def _store_zeros(
    y, y_row, plan, start, rows, tokens, inside, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Zeros in this program's columns for plan rows `start` to `start + rows`."""
    token, live = load_tokens(plan, start, rows, tokens, BLOCK_M)
    at = y[None, :] + (token * y_row)[:, None]
    zeros = tl.zeros((BLOCK_M, BLOCK_N), dtype=y.dtype.element_ty)
    tl.store(at, zeros, mask=live[:, None] & inside[None, :])
