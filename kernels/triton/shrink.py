"""The first half, `h = scale * x @ A.T`: a block of tokens against a block of A's rows.

A program owns (slice, block of ranks, part of K) and walks over its share of the batch's tiles.
The product over one part of K goes to that part's own plane of `h`, so programs never add to
the same place: no atomics, nothing to zero, the same sum in the same order every time. Where K
is not cut, the one plane is `h` itself, and already has the type that B is multiplied in. Only
the columns below a slot's rank count; what else is written ends the 16 bytes of a store.
"""

# Constexpr parameters are upper-case, as is Triton's habit; Triton functions are not typed.
# ruff: noqa: N803, N806
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from multilora_kernels.configs import MIN_BLOCK, ShrinkConfig
from multilora_kernels.triton.launch import Batch, Launch, launch_options
from multilora_kernels.triton.tiles import (
    count_parts,
    dot,
    load_part,
    load_tokens,
    round_up,
    store_grain,
)

_MIN_BLOCK = tl.constexpr(MIN_BLOCK)


def prepare_shrink(
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    batch: Batch,
    scale: float,
    config: ShrinkConfig,
    kept: torch.dtype | None = None,
) -> tuple[torch.Tensor, Launch]:
    """The launch for all slices, to be run, and the memory that it writes.

    Args:
        x: of shape [T, K].
        lora_a: As for `multilora_kernels.lora_shrink`.
        batch: The batch.
        scale: Factor of every product.
        config: The blocks.
        kept: The type that h will be rounded to in any case. None: x's, if lora_a has it too, or
            float32; that is right where y has x's type and lora_b has lora_a's.

    Returns:
        of shape [parts of K, slices, T, R]: h itself in the type `kept` if there is one part, or
        else float32, and the sum over the first dimension is h. What lies past a token's rank is
        undefined; the rows of tokens without adapter are never written.
    """
    tokens, k = x.shape
    max_rank = lora_a[0].size(-2)
    block_m = batch.rows_per_program(config.block_m)
    # Parts of K are whole blocks, equally many for all parts but the last.
    blocks = triton.cdiv(k, config.block_k)
    chunk = triton.cdiv(blocks, min(config.split_k, blocks))
    split_k = triton.cdiv(blocks, chunk)
    if kept is None:
        kept = kept_type(x, lora_a)
    # Parts are added up before they are rounded.
    dtype = kept if split_k == 1 else torch.float32
    planes = torch.empty(split_k, len(lora_a), tokens, max_rank, dtype=dtype, device=x.device)
    programs = split_k * len(lora_a) * triton.cdiv(max_rank, config.block_r)
    launch = Launch(
        shrink_kernel,
        (programs, batch.lanes(programs, tokens, block_m)),
        {
            "planes": planes,
            "x": x,
            "a_slices": tuple(lora_a),
            "scale": scale,
            "x_row": x.stride(0),
            **batch.arguments(tokens),
        },
        {
            "A_SLOT": tuple(a.stride(0) for a in lora_a),
            "A_ROW": tuple(a.stride(-2) for a in lora_a),
            "K": k,
            "R": max_rank,
            "GRAIN": store_grain(planes),
            "BLOCK_M": block_m,
            "BLOCK_R": config.block_r,
            "BLOCK_K": config.block_k,
            "CHUNK": chunk * config.block_k,
            "SPLIT_K": split_k,
            "PDL": batch.facts.pdl,
        },
        launch_options(config.num_warps, config.num_stages),
    )
    return planes, launch


def kept_type(activations: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.dtype:
    """The type that h is multiplied by B in: the one of y and B, or float32 if they differ."""
    own = activations.dtype
    return own if own == weights[0].dtype else torch.float32


@triton.jit(
    do_not_specialize=["tokens", "tile_slot", "max_tiles"],
    # A layer's ranks are some rows of a table: where they begin must not make another kernel.
    do_not_specialize_on_alignment=["ranks"],
)
def shrink_kernel(
    planes,  # [SPLIT_K, slices, tokens, R]
    x,  # [tokens, K]
    a_slices,  # per slice [slots, R, K]
    ranks,  # int32 [slices, slots]
    plan,
    tokens,
    tile_slot,
    max_tiles,
    scale,
    x_row,
    ranks_slice,
    ranks_slot,
    A_SLOT: tl.constexpr,  # per slice, elements from slot to slot
    A_ROW: tl.constexpr,  # per slice, elements from row to row
    K: tl.constexpr,
    R: tl.constexpr,
    GRAIN: tl.constexpr,  # ranks that a wide store covers
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,  # elements of K in a part, a multiple of BLOCK_K
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (slices x blocks of R x SPLIT_K, lanes); a lane does every lanes-th unit of work."""
    if PDL:
        # The second half's programs may take their places as soon as the last ones of this half
        # have theirs; they wait for the results themselves.
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    split = program % SPLIT_K
    first_r = program // SPLIT_K % tl.cdiv(R, BLOCK_R) * BLOCK_R
    slice_id = program // (SPLIT_K * tl.cdiv(R, BLOCK_R))
    tiles, parts = count_parts(plan, BLOCK_M)
    for part in tl.range(tl.program_id(1), parts, tl.num_programs(1), num_stages=1):
        slot, start, rows = load_part(plan, part, tiles, tile_slot, max_tiles, BLOCK_M)
        rank = tl.load(ranks + slice_id * ranks_slice + slot * ranks_slot)
        width = tl.minimum(rank - first_r, BLOCK_R)
        if (rows > 0) & (width > 0):
            token, live = load_tokens(plan, start, rows, tokens, BLOCK_M)
            a = a_slices[0] + slot * A_SLOT[0]
            a_row = A_ROW[0]
            for i in tl.static_range(1, len(A_SLOT)):
                if slice_id == i:
                    a = a_slices[i] + slot * A_SLOT[i]
                if A_ROW[i] != A_ROW[0]:
                    a_row = tl.where(slice_id == i, A_ROW[i], a_row)
            a += first_r.to(tl.int64) * a_row
            plane = split * len(A_SLOT) + slice_id
            h = planes + (plane.to(tl.int64) * tokens + token) * R + first_r
            # One body per power of two up to BLOCK_R, so that a low rank in a server of high
            # ranks multiplies a narrow block and not a wide one of zeros.
            for halvings in tl.static_range(0, 8):
                if BLOCK_R >> halvings >= _MIN_BLOCK:
                    _shrink_block(
                        h,
                        x + token * x_row,
                        a,
                        a_row,
                        live,
                        width,
                        split * CHUNK,
                        scale,
                        K,
                        GRAIN,
                        BLOCK_M,
                        BLOCK_R >> halvings,
                        BLOCK_K,
                        CHUNK,
                        SPLIT_K,
                    )


@triton.jit
def _shrink_block(
    h,  # pointers to the rows' first column, [BLOCK_M]
    x,  # pointers to the rows, [BLOCK_M]
    a,  # pointer to the first row
    a_row,
    live,
    width,
    first_k,
    scale,
    K: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """`h[:, :width] = scale * x[:, part of K] @ a[:width, part of K].T`, if BLOCK just fits."""
    HALF: tl.constexpr = BLOCK // 2 if BLOCK > _MIN_BLOCK else 0
    if (width > HALF) & (width <= BLOCK):
        k = first_k + tl.arange(0, BLOCK_K)
        r = tl.arange(0, BLOCK)
        x_block = x[:, None] + k[None, :]
        a_block = a + r[None, :] * a_row + k[:, None]
        product = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
        for done in range(0, CHUNK, BLOCK_K):
            x_mask = live[:, None]
            a_mask = r[None, :] < width
            if CHUNK * SPLIT_K != K:
                x_mask &= k[None, :] + done < K
                a_mask &= k[:, None] + done < K
            xs = tl.load(x_block + done, mask=x_mask, other=0.0)
            weights = tl.load(a_block + done, mask=a_mask, other=0.0)
            product = dot(xs, weights, product)
        # Past the width the product is zero, or NaN in a row of x that has one.
        mask = live[:, None] & (r < round_up(width, GRAIN))[None, :]
        tl.store(h[:, None] + r[None, :], (product * scale).to(h.dtype.element_ty), mask=mask)
