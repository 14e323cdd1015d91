"""The second half, `y += h @ B.T`: a block of tokens against neighbouring columns of one slice.

A piece of the work is a block of columns. The blocks of all slices are numbered one slice after the
other, so a narrow slice (k and v under grouped-query attention) brings only the blocks that it
has. A program takes a run of neighbouring blocks: it reads the plan, the rank and `h` once for all
of those in one slice, and the next block of B while it works on one. The planes of `h` from a split
product it adds up on its way, always in the same order; in a long batch `combine` may have done so
before, since all runs need the same sum.
"""

# Constexpr parameters are upper-case, as is Triton's habit; Triton functions are not typed.
# Tuples are put together by `+`: Triton knows no other way.
# ruff: noqa: N803, N806, RUF005
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from multilora_kernels.configs import MIN_BLOCK, ExpandConfig
from multilora_kernels.configs.config_facts import power_of_two_up
from multilora_kernels.factors import OutputFactors
from multilora_kernels.triton.activations import row_step
from multilora_kernels.triton.combine import pays_before_expand, prepare_combine
from multilora_kernels.triton.launch import Batch, Launch, Spread, launch_options
from multilora_kernels.triton.shrink import kept_type
from multilora_kernels.triton.tiles import (
    base_rows,
    dot,
    load_header,
    load_part,
    load_tokens,
    round_up,
    sum_planes,
    take_share,
)

_MIN_BLOCK = tl.constexpr(MIN_BLOCK)
_MAX_SUMS = tl.constexpr(2048)  # of a block of y; 16 for each of 128 threads
_AHEAD = tl.constexpr(2)  # blocks of B that are asked for while one is multiplied


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
        y: of shape [T, W], aligned from column `offset` on (see `activations`), changed in place.
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
    blocks = sum(triton.cdiv(width, config.block_n) for width in widths)
    spread = Spread(blocks, block_m, config.per_processor)
    pdl = batch.facts.pdl and after_shrink
    before = None
    tensors: dict[str, torch.Tensor | None] = {}
    steps: dict[str, int] = {}
    if factors is not None:
        tensors = {"factors": factors.values, "marks": factors.marks, "bias": factors.bias}
        steps = {"FACTORS_SLOT": factors.values.stride(0), "MARKS_SLICE": factors.marks.stride(0)}
    kept = kept_type(y, lora_b)
    # As if every part of a tile were full: a slice's planes are read once for each run of blocks.
    rounded = power_of_two_up(tokens)  # as all that decides what is launched
    runs = min(blocks, len(widths) + batch.programs(spread, rounded) * block_m // rounded)
    if after_shrink and pays_before_expand(planes, runs, kept):
        h = torch.empty(planes.shape[1:], dtype=kept, device=planes.device)
        before = prepare_combine(h, planes, batch, zeros=False)
        planes = h.unsqueeze(0)
    return Launch(
        expand_kernel,
        (batch.programs(spread, tokens),),
        {
            "y": y,
            "planes": planes,
            "b_slices": tuple(lora_b),
            "offset": offset,
            "y_row": row_step(y),
            **batch.arguments(tokens),
            **tensors,
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
            **steps,
        },
        launch_options(
            config.num_warps, config.num_stages, batch.facts, config.per_processor, pdl=pdl
        ),
        before,
        spread,
    )


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
    do_not_specialize=["tokens", "order"],
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
    order,
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
    """A piece is a block of columns of one slice."""
    SLICES: tl.constexpr = len(WIDTHS)
    pieces = 0
    for i in tl.static_range(SLICES):
        pieces += tl.cdiv(WIDTHS[i], BLOCK_N)
    parts, header = load_header(plan, tl.program_id(0) // pieces, BLOCK_M)
    first, end = take_share(parts * pieces)
    y += offset
    # One pointer less for each slice, which cards before sm_90 have no register for.
    APART: tl.constexpr = BLOCK_M > _MIN_BLOCK and not PDL
    for part in tl.range(first // pieces, tl.cdiv(end, pieces), num_stages=1):
        slot, start, rows = load_part(plan, part, header, BLOCK_M)
        token, live = load_tokens(plan, order, start, rows, tokens, BLOCK_M)
        y_rows = y + token * y_row
        from_block, to_block = first - part * pieces, end - part * pieces
        before = rows * 0  # columns of the slices before
        for number in tl.range(0, SLICES, num_stages=1):
            slice_id = rows * 0 + number
            width = rows * 0 + WIDTHS[0]
            b = b_slices[0] + slot * B_SLOT[0]
            b_row = B_ROW[0]
            b_column = B_COLUMN[0]
            for i in tl.static_range(1, SLICES):
                if slice_id == i:
                    width = rows * 0 + WIDTHS[i]
                    b = b_slices[i] + slot * B_SLOT[i]
                if B_ROW[i] != B_ROW[0]:
                    b_row = tl.where(slice_id == i, B_ROW[i], b_row)
                if B_COLUMN[i] != B_COLUMN[0]:
                    b_column = tl.where(slice_id == i, B_COLUMN[i], b_column)
            blocks = tl.cdiv(width, BLOCK_N)
            block, to = tl.maximum(from_block, 0), tl.minimum(to_block, blocks)
            if block < to:
                rank = tl.load(ranks + slice_id * ranks_slice + slot * ranks_slot)
                if rank > 0:
                    factor, kept, is_marked = None, None, 0
                    if factors is not None:
                        is_marked = tl.load(marks + slice_id * MARKS_SLICE + slot)
                        factor = factors + slot * FACTORS_SLOT + before
                        if bias is not None:
                            kept = bias + before
                    # One body per power of two up to the highest rank; for float32 just one.
                    for halvings in tl.static_range(0, 12):
                        if halvings == 11 or (
                            _MIN_BLOCK << (11 - halvings) < 2 * R and BLOCK_R > _MIN_BLOCK
                        ):
                            _expand_blocks(
                                y_rows + (0 if APART else before),
                                before if APART else 0,
                                planes + (slice_id.to(tl.int64) * tokens + token) * R,
                                b,
                                b_row,
                                b_column,
                                factor,
                                kept,
                                is_marked,
                                live,
                                block,
                                to,
                                width,
                                rank,
                                tokens,
                                SLICES,
                                R,
                                B_ROW,
                                GRAIN,
                                SPLIT_K,
                                OVERWRITE,
                                BLOCK_M,
                                BLOCK_N,
                                BLOCK_R,
                                _MIN_BLOCK << (11 - halvings),
                                PDL,
                            )
                elif OVERWRITE:
                    _store_zeros(y_rows + before, live, block, to, width, BLOCK_M, BLOCK_N, PDL)
            from_block -= blocks
            to_block -= blocks
            before += width
    if OVERWRITE:
        base, count = base_rows(plan)
        first, end = take_share(tl.cdiv(count, BLOCK_M) * pieces)
        for part in tl.range(first // pieces, tl.cdiv(end, pieces), num_stages=1):
            done = part * BLOCK_M
            token, live = load_tokens(plan, order, base + done, count - done, tokens, BLOCK_M)
            y_rows = y + token * y_row
            from_block, to_block = first - part * pieces, end - part * pieces
            for i in tl.static_range(SLICES):
                blocks = tl.cdiv(WIDTHS[i], BLOCK_N)
                block, to = tl.maximum(from_block, 0), tl.minimum(to_block, blocks)
                _store_zeros(y_rows, live, block, to, WIDTHS[i], BLOCK_M, BLOCK_N, PDL)
                from_block -= blocks
                to_block -= blocks
                y_rows += WIDTHS[i]
    if PDL:
        # Programs without work wait too: a kernel launched next waits for this one only, and
        # must find the first half ended as well.
        tl.extra.cuda.gdc_wait()


@triton.jit
def _expand_blocks(
    y,  # pointers to columns of the rows, [BLOCK_M]
    start,  # columns from there to this slice
    h,  # pointers to the rows in the first plane, [BLOCK_M]
    b,  # pointer to the first row
    b_row,
    b_column,
    factor,  # pointer to the slice's first; None: there are none
    kept,  # pointer to what is not multiplied; None: nothing
    is_marked,  # whether the factors count
    live,
    first,
    to,
    width,
    rank,
    tokens,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    B_ROW: tl.constexpr,  # of every slice
    GRAIN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    OVERWRITE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BODY: tl.constexpr,
    PDL: tl.constexpr,
):
    """`y += sum(planes)[:, :rank] @ b[:, :rank].T`, if BODY is the one for this rank.

    For blocks of columns `first` up to `to`.
    """
    HALF: tl.constexpr = BODY // 2 if BODY > _MIN_BLOCK else 0
    OUT: tl.constexpr = y.dtype.element_ty
    # Ranks above the widest block are several blocks, all of them products of one column block.
    BLOCK: tl.constexpr = BODY if BODY < BLOCK_R else BLOCK_R
    BLOCKS: tl.constexpr = ((BODY if BODY < R else R) + BLOCK - 1) // BLOCK
    # With fewer ranks more columns at a time, or too few bytes of B would be under way.
    FITS: tl.constexpr = _MAX_SUMS // (BLOCK_M * BLOCK_N)
    WIDER: tl.constexpr = FITS if FITS < BLOCK_R // BLOCK else BLOCK_R // BLOCK
    COLUMNS: tl.constexpr = BLOCK_N * WIDER if WIDER > 1 else BLOCK_N
    # Blocks are as narrow as this for float32; several of them would not fit into registers.
    LOOPED: tl.constexpr = R > BODY and BLOCK_R == _MIN_BLOCK
    STEPS: tl.constexpr = _steps_in_a_pass(BLOCK_M, BLOCK_R, R, b.dtype.element_ty, B_ROW, PDL)
    if (rank > HALF) & (LOOPED or rank <= BODY):
        lane = tl.arange(0, COLUMNS)
        begin, end = first * BLOCK_N, tl.minimum(to * BLOCK_N, width)
        # Pointers go on with the loop, for fewer registers. Not y's where ranks are one block: by
        # the compiler's schedule a pass would take a tenth more cycles.
        CARRIED: tl.constexpr = R > BLOCK_R
        b += begin.to(tl.int64) * b_row
        y += begin if CARRIED else 0
        weights = _load_b(b, b_row, b_column, end - begin, rank, GRAIN, COLUMNS, BLOCK)
        if PDL:
            # Returns when the first half has ended and its stores are visible. All that came
            # before, the weights included, was loaded while it still ran.
            tl.extra.cuda.gdc_wait()
        # Summed once for all columns, and kept in the type that B is multiplied in.
        totals = sum_planes(h, live, rank, tokens, SLICES, R, SPLIT_K, BLOCK, BLOCKS)
        sums = ()
        for i in tl.static_range(BLOCKS):
            total = _as_factor(totals[i], rank - i * BLOCK, b, OUT, BLOCK)
            sums = sums + (total,)  # type: ignore[assignment]
        block = tl.cast(b_column, tl.int64) * BLOCK  # elements from block to block
        # Passes of all steps; then a last step, if one is left, with no block of B to ask for.
        # `begin` goes along, or registers would not suffice; single steps are shorter by `done`.
        for steps in tl.static_range(STEPS, 0, -1):
            for done in tl.range(begin, end - (steps - 1) * COLUMNS, steps * COLUMNS, num_stages=1):
                for _ in tl.static_range(steps):
                    here = done if STEPS == 1 else begin
                    left = end - here
                    column, inside = here + lane, lane < left
                    at = y[:, None] + ((lane if CARRIED else column) + start)[None, :]
                    mask = live[:, None] & inside[None, :]
                    if steps == STEPS:
                        rest = left - COLUMNS
                        ahead = b + tl.cast(b_row, tl.int64) * COLUMNS
                        coming = _load_b(ahead, b_row, b_column, rest, rank, GRAIN, COLUMNS, BLOCK)
                    product = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
                    loaded = (weights,)
                    for i in tl.static_range(1, BLOCKS + _AHEAD):
                        if i < BLOCKS:
                            own, ranks = b + i * block, rank - i * BLOCK
                            more = _load_b(own, b_row, b_column, left, ranks, GRAIN, COLUMNS, BLOCK)
                            loaded = loaded + (more,)  # type: ignore[assignment]
                        if i >= _AHEAD:
                            ranks = rank - (i - _AHEAD) * BLOCK
                            product = _add_product(
                                product, sums[i - _AHEAD], loaded[i - _AHEAD], ranks, GRAIN, BLOCK
                            )
                    if LOOPED:
                        for r in range(BLOCK, rank, BLOCK):
                            own, ranks = b + tl.cast(b_column, tl.int64) * r, rank - r
                            more = _load_b(own, b_row, b_column, left, ranks, GRAIN, COLUMNS, BLOCK)
                            total = sum_planes(
                                h + r, live, ranks, tokens, SLICES, R, SPLIT_K, BLOCK, 1
                            )[0]
                            total = _as_factor(total, ranks, b, OUT, BLOCK)
                            product = _add_product(product, total, more, ranks, GRAIN, BLOCK)
                    if not OVERWRITE:
                        product += tl.load(at, mask=mask, other=0.0).to(tl.float32)
                    if factor is not None:  # noqa: SIM102 (known when it is compiled)
                        if is_marked != 0:
                            grown = product
                            if kept is not None:
                                grown -= tl.load(kept + column, mask=inside, other=0.0)[None, :]
                            share = tl.load(factor + column, mask=inside, other=0.0)
                            product += share[None, :] * grown
                    tl.store(at, product.to(OUT), mask=mask)
                    if steps == STEPS:
                        weights = coming
                        b = ahead
                        y += COLUMNS if CARRIED else 0
                    begin += COLUMNS


@triton.constexpr_function
def _steps_in_a_pass(rows, widest_block, max_rank, kind, b_rows, pdl):
    """Steps that the loop over columns makes before it jumps back.

    With one, the next block of B is copied into the registers of the last one: up to a fifth of a
    step's instructions. With two, both have registers of their own. They lack them in servers of
    more ranks than the widest block has, and of 32, where a multiprocessor is given four programs;
    with slices whose rows of B are apart by different steps; and on sm_80 by Triton 3.6. So only
    cards since sm_90, which start early, have two. In a long batch products outweigh the copies.
    """
    has_registers = max_rank <= widest_block and widest_block != 2 * MIN_BLOCK
    is_even = len(set(b_rows)) == 1
    is_short = rows == MIN_BLOCK and kind.primitive_bitwidth == 16
    return 2 if pdl and is_short and is_even and has_registers else 1


@triton.jit
def _load_b(
    b, b_row, b_column, left, rank, GRAIN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """`b[:left].T`, [BLOCK, COLUMNS], to the end of the 16 bytes in which the rank ends.

    b: Pointer to the first rank of the first column.
    """
    column, r = tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    at = b + (column.to(tl.int64) * b_row)[None, :] + r[:, None] * b_column
    mask = (column < left)[None, :] & (r < round_up(rank, GRAIN))[:, None]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _as_factor(total, rank, b, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """A block of h as it is multiplied by B: zeros past the rank, and in B's type if y has it."""
    # Past the rank lies whatever the memory held, even NaN: both factors must be zero there.
    total = tl.where(tl.arange(0, BLOCK)[None, :] < rank, total, 0.0)
    return total.to(OUT) if b.dtype.element_ty == OUT else total


@triton.jit
def _add_product(product, total, weights, rank, GRAIN: tl.constexpr, BLOCK: tl.constexpr):
    """`product + total @ weights`."""
    if GRAIN > 1:
        # Their load goes on past the rank.
        weights = tl.where(tl.arange(0, BLOCK)[:, None] < rank, weights, 0.0)
    return dot(total, weights, product)


@triton.jit
def _store_zeros(
    y, live, first, to, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr
):
    """Zeros in the blocks of columns `first` up to `to`; y: pointers to the rows, [BLOCK_M]."""
    if PDL:
        # Nothing is written while a kernel before this one may still read it.
        tl.extra.cuda.gdc_wait()
    for block in tl.range(first, to, num_stages=1):
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), dtype=y.dtype.element_ty)
        tl.store(
            y[:, None] + column[None, :], zeros, mask=live[:, None] & (column < width)[None, :]
        )
