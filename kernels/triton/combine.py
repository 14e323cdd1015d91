"""Adds up the planes of a split shrink: where the caller wants `h` itself, and for long batches.

`lora_shrink` returns the sum: layers that shard the rank dimension gather `h` between the halves,
and full-weight heads take it as their result. `lora_linear` adds the planes while expanding, and
does so once beforehand where each of many column blocks would read them again. Both sums have the
same bits: the same order, the same rounding.
"""

# Constexpr parameters are upper-case, as is Triton's habit; Triton functions are not typed.
# ruff: noqa: N803, N806
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from multilora_kernels.configs.config_facts import power_of_two_up
from multilora_kernels.configs.defaults import SHORT_BATCH
from multilora_kernels.triton.launch import Batch, Launch, Spread, launch_options
from multilora_kernels.triton.tiles import (
    base_rows,
    load_header,
    load_part,
    load_tokens,
    round_up,
    store_grain,
    sum_planes,
    take_share,
)

BLOCK_M, BLOCK_N, NUM_WARPS = 16, 64, 4
PER_PROCESSOR = 4

# What one launch more is taken to cost, in bytes that the second-level cache could deliver
# meanwhile: a microsecond or two at some terabytes a second. An estimate, not measured.
_LAUNCH_BYTES = 8 << 20


def pays_before_expand(planes: torch.Tensor, column_blocks: int, kept: torch.dtype) -> bool:
    """Whether a sum beforehand saves the second half more bytes than its launch is worth.

    Answered from shapes alone, and as if all ranks were the highest. A short batch stays at two
    launches: the fewer its bytes, the more a launch counts.

    Args:
        planes: of shape [parts of K, slices, T, R].
        column_blocks: Blocks of columns of all slices, each of which reads its slice's h.
        kept: The type that the sum would be kept in.
    """
    parts, slices, tokens, max_rank = planes.shape
    if tokens <= SHORT_BATCH:
        return False
    in_planes, in_sum = parts * planes.element_size(), kept.itemsize
    saved = column_blocks * (in_planes - in_sum) - slices * (in_planes + in_sum)
    return power_of_two_up(tokens) * max_rank * saved > _LAUNCH_BYTES


def prepare_combine(
    h: torch.Tensor, planes: torch.Tensor, batch: Batch, *, zeros: bool = True
) -> Launch:
    """The launch that writes h.

    Args:
        h: of shape [slices, T, R], any of the three dtypes; overwritten.
        planes: what `shrink`, launched just before, returned.
        batch: The batch.
        zeros: Whether to write zeros for every other token of the plan and past a token's rank.
            If not, nothing is written for other tokens, nor past the 16 bytes in which a rank ends.
    """
    split_k, slices, tokens, max_rank = planes.shape
    grain = store_grain(h)
    spread = Spread(slices * triton.cdiv(max_rank, BLOCK_N), BLOCK_M, PER_PROCESSOR)
    return Launch(
        combine_kernel,
        (batch.programs(spread, tokens),),
        {
            "h": h,
            "planes": planes,
            "h_slice": h.stride(0) // grain,
            "h_row": h.stride(1) // grain,
            **batch.arguments(tokens),
        },
        {
            "SLICES": slices,
            "R": max_rank,
            "GRAIN": grain,
            "SPLIT_K": split_k,
            "BLOCK_M": BLOCK_M,
            "BLOCK_N": BLOCK_N,
            "ZEROS": zeros,
            "PDL": batch.facts.pdl,
        },
        launch_options(NUM_WARPS, 1, batch.facts, PER_PROCESSOR, pdl=batch.facts.pdl),
        spread=spread,
    )


@triton.jit(
    do_not_specialize=["tokens", "order", "h_slice", "h_row"],
    # A layer's ranks are some rows of a table: where they begin must not make another kernel.
    do_not_specialize_on_alignment=["ranks"],
)
def combine_kernel(
    h,  # [slices, tokens, R]
    planes,  # [SPLIT_K, slices, tokens, R]
    ranks,  # int32 [slices, slots]
    plan,
    tokens,
    order,
    h_slice,  # in units of GRAIN elements
    h_row,  # likewise: so the compiler sees rows that begin where a wide store may
    ranks_slice,
    ranks_slot,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    GRAIN: tl.constexpr,  # ranks that a wide store covers
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ZEROS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A piece is a block of columns of one slice."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    COLUMN_BLOCKS: tl.constexpr = (R + BLOCK_N - 1) // BLOCK_N  # Triton 3.6 nests cdiv's constant
    PIECES: tl.constexpr = SLICES * COLUMN_BLOCKS
    parts, header = load_header(plan, tl.program_id(0) // PIECES, BLOCK_M)
    first, end = take_share(parts * PIECES)
    for piece in tl.range(first, end, num_stages=1):
        slot, start, rows = load_part(plan, piece // PIECES, header, BLOCK_M)
        slice_id = piece % PIECES // COLUMN_BLOCKS
        first_column = piece % COLUMN_BLOCKS * BLOCK_N
        column = first_column + tl.arange(0, BLOCK_N)
        rank = tl.load(ranks + slice_id * ranks_slice + slot * ranks_slot)
        token, live = load_tokens(plan, order, start, rows, tokens, BLOCK_M)
        row = planes + (slice_id.to(tl.int64) * tokens + token) * R
        left = rank - first_column
        own = row + first_column
        total = sum_planes(own, live, left, tokens, SLICES, R, SPLIT_K, BLOCK_N, 1)[0]
        total = tl.where(column[None, :] < rank, total, 0.0)
        written = column < R if ZEROS else column < round_up(rank, GRAIN)
        own = h + slice_id * h_slice.to(tl.int64) * GRAIN + column
        tl.store(
            own[None, :] + (token * h_row * GRAIN)[:, None],
            total.to(h.dtype.element_ty),
            mask=live[:, None] & written[None, :],
        )
    if ZEROS:
        base, count = base_rows(plan)
        first, end = take_share(tl.cdiv(count, BLOCK_M) * PIECES)
        for piece in tl.range(first, end, num_stages=1):
            done = piece // PIECES * BLOCK_M
            slice_id = piece % PIECES // COLUMN_BLOCKS
            column = piece % COLUMN_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
            token, live = load_tokens(plan, order, base + done, count - done, tokens, BLOCK_M)
            own = h + slice_id * h_slice.to(tl.int64) * GRAIN + column
            tl.store(
                own[None, :] + (token * h_row * GRAIN)[:, None],
                tl.zeros((BLOCK_M, BLOCK_N), dtype=h.dtype.element_ty),
                mask=live[:, None] & (column < R)[None, :],
            )
