"""The first half, `h = scale * x @ A.T`: a block of tokens against a block of A's rows.

A piece of the work is one part of K for one slice, up to the slot's rank. Neighbouring pieces are
the parts of K of the same tokens and slice, so a program walks through several without a break. The
product over one part of K goes to that part's own plane of `h`, so programs never add to
the same place: no atomics, nothing to zero, the same sum in the same order every time. Where K
is not cut, the one plane is `h` itself, and already has the type that B is multiplied in. Only
the columns below a slot's rank count; what else is written ends the 16 bytes of a store.
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

from multilora_kernels.configs import MIN_BLOCK, ShrinkConfig
from multilora_kernels.triton.activations import row_step
from multilora_kernels.triton.launch import Batch, Launch, Spread, launch_options
from multilora_kernels.triton.tiles import (
    dot,
    load_header,
    load_part,
    load_tokens,
    round_up,
    store_grain,
    take_share,
)

_MIN_BLOCK = tl.constexpr(MIN_BLOCK)
_MAX_VALUES = tl.constexpr(4096)  # of A that are widened at a time; 32 for each of 128 threads


def prepare_shrink(
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    batch: Batch,
    scale: float,
    config: ShrinkConfig,
    kept: torch.dtype | None = None,
    sharers: int = 1,
) -> tuple[torch.Tensor, Launch]:
    """The launch for all slices, to be run, and the memory that it writes.

    Args:
        x: of shape [T, K], aligned (see `activations`).
        lora_a: As for `multilora_kernels.lora_shrink`.
        batch: The batch.
        scale: Factor of every product.
        config: The blocks.
        kept: The type that h will be rounded to in any case. None: x's, if lora_a has it too, or
            float32; that is right where y has x's type and lora_b has lora_a's.
        sharers: Neighbouring tokens that share a row of x, which then has shape [T / sharers, K].

    Returns:
        of shape [parts of K, slices, T, R]: h itself in the type `kept` if there is one part, or
        else float32, and the sum over the first dimension is h. What lies past a token's rank is
        undefined; the rows of tokens without adapter are never written.
    """
    tokens, k = x.size(0) * sharers, x.size(1)
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
    spread = Spread(len(lora_a) * split_k, block_m, config.per_processor)
    early = batch.facts.pdl and config.early
    launch = Launch(
        shrink_kernel,
        (batch.programs(spread, tokens),),
        {
            "planes": planes,
            "x": x,
            "a_slices": tuple(lora_a),
            "scale": scale,
            "x_row": row_step(x),
            **batch.arguments(tokens),
        },
        {
            "A_SLOT": tuple(a.stride(0) for a in lora_a),
            "A_ROW": tuple(a.stride(-2) for a in lora_a),
            "K": k,
            "SHARERS": sharers,
            "R": max_rank,
            "GRAIN": store_grain(planes),
            "BLOCK_M": block_m,
            "BLOCK_R": config.block_r,
            "BLOCK_K": config.block_k,
            "CHUNK": chunk * config.block_k,
            "SPLIT_K": split_k,
            "PDL": batch.facts.pdl,
            "EARLY": early,
            "VECTOR_ROWS": config.vector_rows,
            "STAGES": config.num_stages,
        },
        launch_options(
            config.num_warps, config.num_stages, batch.facts, config.per_processor, pdl=early
        ),
        spread=spread,
    )
    return planes, launch


def kept_type(activations: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.dtype:
    """The type that h is multiplied by B in: the one of y and B, or float32 if they differ."""
    own = activations.dtype
    return own if own == weights[0].dtype else torch.float32


@triton.jit(
    do_not_specialize=["tokens", "order"],
    # A layer's ranks are some rows of a table: where they begin must not make another kernel.
    do_not_specialize_on_alignment=["ranks"],
)
def shrink_kernel(
    planes,  # [SPLIT_K, slices, tokens, R]
    x,  # [tokens / SHARERS, K]
    a_slices,  # per slice [slots, R, K]
    ranks,  # int32 [slices, slots]
    plan,
    tokens,
    order,
    scale,
    x_row,
    ranks_slice,
    ranks_slot,
    A_SLOT: tl.constexpr,  # per slice, elements from slot to slot
    A_ROW: tl.constexpr,  # per slice, elements from row to row
    K: tl.constexpr,
    SHARERS: tl.constexpr,  # tokens of each row of x
    R: tl.constexpr,
    GRAIN: tl.constexpr,  # ranks that a wide store covers
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,  # elements of K in a part, a multiple of BLOCK_K
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,  # launched so that it may start before its predecessor has ended
    VECTOR_ROWS: tl.constexpr,  # of parts that are multiplied without tensor cores, at most
    STAGES: tl.constexpr,
):
    """A piece is a part of K for one slice."""
    if PDL and not EARLY:
        # The second half's programs may take their places as soon as the last ones of this half
        # have theirs; they wait for the results themselves.
        tl.extra.cuda.gdc_launch_dependents()
    SLICES: tl.constexpr = len(A_SLOT)
    parts, header = load_header(plan, tl.program_id(0) // (SLICES * SPLIT_K), BLOCK_M)
    first, end = take_share(parts * (SLICES * SPLIT_K))
    # Those of one slice and one part of a tile at a time.
    for number in tl.range(first // SPLIT_K, tl.cdiv(end, SPLIT_K), num_stages=1):
        slice_id = number % SLICES
        slot, start, rows = load_part(plan, number // SLICES, header, BLOCK_M)
        rank = tl.load(ranks + slice_id * ranks_slice + slot * ranks_slot)
        token, live = load_tokens(plan, order, start, rows, tokens, BLOCK_M)
        if EARLY:
            # Returns when the kernel before has ended. Before that nobody reads x, which it may
            # have written, or writes; nor do the second half's programs take places that it needs.
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if rank > 0:
            a = a_slices[0] + slot * A_SLOT[0]
            a_row = A_ROW[0]
            for i in tl.static_range(1, SLICES):
                if slice_id == i:
                    a = a_slices[i] + slot * A_SLOT[i]
                if A_ROW[i] != A_ROW[0]:
                    a_row = tl.where(slice_id == i, A_ROW[i], a_row)
            first_k = tl.maximum(first - number * SPLIT_K, 0)
            plane = first_k * SLICES + slice_id
            h = planes + (plane.to(tl.int64) * tokens + token) * R
            end_k = tl.minimum(tl.minimum(end - number * SPLIT_K, SPLIT_K) * CHUNK, K)
            for done_r in tl.range(0, rank if R > BLOCK_R else 1, BLOCK_R, num_stages=1):
                first_r = rank * 0 + done_r  # a tensor in the interpreter, too
                width = tl.minimum(rank - first_r, BLOCK_R)
                few = tl.where(rows <= VECTOR_ROWS, width, 0) if VECTOR_ROWS > 0 else 0
                # One body per power of two up to BLOCK_R, so that a low rank in a server of high
                # ranks multiplies a narrow block and not a wide one of zeros.
                for halvings in tl.static_range(0, 8):
                    if BLOCK_R >> halvings >= _MIN_BLOCK:
                        _shrink_block(
                            h + first_r,
                            tokens.to(tl.int64) * (SLICES * R),
                            x + token // SHARERS * x_row,
                            a + first_r.to(tl.int64) * a_row,
                            a_row,
                            live,
                            width - few,
                            first_k * CHUNK,
                            end_k,
                            scale,
                            K,
                            GRAIN,
                            BLOCK_M,
                            BLOCK_R,
                            BLOCK_R >> halvings,
                            BLOCK_K,
                            CHUNK,
                            SPLIT_K,
                        )
                        if VECTOR_ROWS > 0:
                            _shrink_rows(
                                planes + plane.to(tl.int64) * tokens * R + first_r,
                                tokens.to(tl.int64) * (SLICES * R),
                                x,
                                x_row,
                                a + first_r.to(tl.int64) * a_row,
                                a_row,
                                plan + order + start,
                                rows,
                                tokens,
                                few,
                                first_k * CHUNK,
                                end_k,
                                scale,
                                K,
                                SHARERS,
                                R,
                                GRAIN,
                                BLOCK_R >> halvings,
                                BLOCK_K,
                                CHUNK,
                                SPLIT_K,
                                VECTOR_ROWS,
                                STAGES,
                            )
    if EARLY:
        # Programs without work wait too: the second half waits for this launch only.
        tl.extra.cuda.gdc_wait()


@triton.jit
def _shrink_block(
    h,  # pointers to the rows' first column in the first plane, [BLOCK_M]
    plane,  # elements from plane to plane
    x,  # pointers to the rows, [BLOCK_M]
    a,  # pointer to the first row
    a_row,
    live,
    width,
    first_k,
    end_k,
    scale,
    K: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """`h[:, :width] = scale * x[:, part] @ a[:width, part].T`, if BLOCK is the one for this width.

    For each part of K from column `first_k` to `end_k`.
    """
    HALF: tl.constexpr = BLOCK // 2 if BLOCK > _MIN_BLOCK else 0
    # Fewer rows of A are longer ones, or too few bytes would be under way: as long as they take
    # no more memory than the widest block, and end where a part of K does.
    STEP: tl.constexpr = _step(BLOCK_K, CHUNK, BLOCK_K * (BLOCK_M + BLOCK_R) // (BLOCK_M + BLOCK))
    if (width > HALF) & (width <= BLOCK):
        k = tl.arange(0, STEP)
        r = tl.arange(0, BLOCK)
        x_block = x[:, None] + k[None, :]
        a_block = a + r[None, :] * a_row + k[:, None]
        # Past the width the product is zero, or NaN in a row of x that has one.
        h_block = h[:, None] + r[None, :]
        # A short batch walks through all of its parts without a break; so does the shortest block,
        # which for one long part would need too many registers. In a long batch a part is long by
        # itself, and sums stay where the wide tensor-core instructions have them.
        FLAT: tl.constexpr = (64 if SPLIT_K > 1 else 2 * _MIN_BLOCK) > BLOCK_M
        WHOLE: tl.constexpr = CHUNK * SPLIT_K == K
        if FLAT:
            product = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
            for done in range(first_k, end_k, STEP):
                product = _add_step(product, x_block, a_block, k, r, live, width, done, K, WHOLE)
                reached = first_k * 0 + done + STEP
                ends = (reached % CHUNK == 0) | (reached >= end_k)
                stored = tl.where(ends, round_up(width, GRAIN), 0)
                mask = live[:, None] & (r < stored)[None, :]
                at = h[:, None] + r[None, :] if BLOCK_M > _MIN_BLOCK else h_block
                tl.store(at, (product * scale).to(h.dtype.element_ty), mask=mask)
                h += tl.where(ends, plane, 0)
                h_block += tl.where(ends, plane, 0)
                product = tl.where(ends, 0.0, product)
        else:
            mask = live[:, None] & (r < round_up(width, GRAIN))[None, :]
            for begin in tl.range(first_k, end_k, CHUNK, num_stages=1):
                product = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
                for done in range(begin, tl.minimum(begin + CHUNK, end_k), STEP):
                    product = _add_step(
                        product, x_block, a_block, k, r, live, width, done, K, WHOLE
                    )
                tl.store(h_block, (product * scale).to(h.dtype.element_ty), mask=mask)
                h_block += plane


@triton.jit
def _shrink_rows(
    h,  # pointer to the first row's first column in the first plane
    plane,  # elements from plane to plane
    x,  # pointer to the first row
    x_row,
    a,  # pointer to the first row
    a_row,
    of_rows,  # pointer to the tokens of the part's rows
    rows,
    tokens,
    width,
    first_k,
    end_k,
    scale,
    K: tl.constexpr,
    SHARERS: tl.constexpr,
    R: tl.constexpr,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `_shrink_block`, for a part of at most ROWS rows, by vector instructions.

    A chain of tensor-core products takes as long for one row as for sixteen. Here each thread adds
    up its own columns of x, and threads add up what they have once a part of K.
    """
    HALF: tl.constexpr = BLOCK // 2 if BLOCK > _MIN_BLOCK else 0
    STEP: tl.constexpr = _step(BLOCK_K, CHUNK, _MAX_VALUES // BLOCK)
    WHOLE: tl.constexpr = CHUNK * SPLIT_K == K
    if (width > HALF) & (width <= BLOCK):
        r = tl.arange(0, BLOCK)
        places = ()
        for i in tl.static_range(ROWS):
            token = tl.load(of_rows + i, mask=i < rows, other=0).to(tl.int64)
            # Of rows that are not there nothing is read or written.
            live = (i < rows) & (token < tokens)
            columns, ranks = tl.where(live, K, 0), tl.where(live, round_up(width, GRAIN), 0)
            own = (x + token // SHARERS * x_row, columns, h + token * R, ranks)
            places = places + (own,)  # type: ignore[assignment]
        for begin in tl.range(first_k, end_k, CHUNK, num_stages=1):
            sums = ()
            for _ in tl.static_range(ROWS):
                sums = sums + (_no_sums(a, BLOCK, STEP),)  # type: ignore[assignment]
            for done in tl.range(begin, tl.minimum(begin + CHUNK, end_k), STEP, num_stages=STAGES):
                sums = _add_rows(sums, places, a, a_row, width, done, K, WHOLE, BLOCK, STEP)
            for i in tl.static_range(ROWS):
                _, _, to, ranks = places[i]  # type: ignore[var-annotated]
                total = tl.sum(sums[i], axis=1) * scale
                at = to + ((begin - first_k) // CHUNK) * plane + r
                tl.store(at, total.to(h.dtype.element_ty), mask=r < ranks)


@triton.jit
def _no_sums(a, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One for each row of A and each 16 bytes of a step, all zero."""
    GROUP: tl.constexpr = 128 // a.dtype.element_ty.primitive_bitwidth
    return tl.zeros((BLOCK, STEP // GROUP), dtype=tl.float32)


@triton.jit
def _add_rows(
    sums,
    places,
    a,
    a_row,
    width,
    done,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The sums, and products of the columns from `done` on; some may lie past K unless WHOLE."""
    GROUP: tl.constexpr = 128 // a.dtype.element_ty.primitive_bitwidth
    r, k = tl.arange(0, BLOCK), done + tl.arange(0, STEP)
    mask = r[:, None] < width
    if not WHOLE:
        mask &= k[None, :] < K
    weights = tl.load(a + r[:, None] * a_row + k[None, :], mask=mask, other=0.0).to(tl.float32)
    grown = ()
    for i in tl.static_range(len(sums)):
        row, columns, _, _ = places[i]
        values = tl.load(row + k, mask=k < columns, other=0.0)
        products = weights * values.to(tl.float32)[None, :]
        own = tl.sum(tl.reshape(products, (BLOCK, STEP // GROUP, GROUP)), axis=2)
        grown = grown + (sums[i] + own,)  # type: ignore[assignment]
    return grown


@triton.constexpr_function
def _step(block_k, chunk, fits):
    """Columns of a step: up to four times `block_k` if that fits; a part has whole steps."""
    step = min(block_k, fits)
    while 2 * step <= min(fits, 4 * block_k) and chunk % (2 * step) == 0:
        step *= 2
    return step


@triton.jit
def _add_step(
    product, x_block, a_block, k, r, live, width, done, K: tl.constexpr, WHOLE: tl.constexpr
):
    """The product, and that of the columns from `done` on; some may lie past K unless WHOLE."""
    x_mask = live[:, None]
    a_mask = r[None, :] < width
    if not WHOLE:
        x_mask &= k[None, :] + done < K
        a_mask &= k[:, None] + done < K
    xs = tl.load(x_block + done, mask=x_mask, other=0.0)
    weights = tl.load(a_block + done, mask=a_mask, other=0.0)
    return dot(xs, weights, product)
