"""Blocks computed from a workload. Not tuned: see README.md beside the kernels."""

from __future__ import annotations

from multilora_kernels.configs.model import (
    MIN_BLOCK,
    ExpandConfig,
    ShrinkConfig,
    Workload,
    power_of_two_down,
    power_of_two_up,
)

SHORT_BATCH = 128
"""Tokens up to which a batch counts as one of decoding."""

# Token counts up to which a block of so many rows is taken. A decode batch has few tokens an
# adapter, and the weights' bytes decide; the more tokens, the more often a wide block is full.
# Not 128 rows for the longest: in the second half, 128 x 128 sums would leave a processor registers
# for one program only; in the first, more blocks of tokens occupy the device better than more
# parts of K do, for these read A from the cache once more, and those add planes to h.
_BLOCK_M = ((SHORT_BATCH, 16), (512, 32))
_LARGEST_BLOCK_M = 64
_LARGEST_BLOCK_R = 64

# Nobody on the host knows how many adapters a small batch has. Blocks are chosen as if there were
# so many blocks of tokens: too many parts cost more in planes than they win.
_ASSUMED_BLOCKS = 4
_PROGRAMS_PER_PROCESSOR = 2
_SHORTEST_PART = 256

# Every column block of the second half reads all planes of h again, in a short batch. Against the
# weights of an adapter with one token these are 2 * parts / block_n * N / (K + N) of the bytes:
# 6 % with 4 parts and 64 columns where the layer's sides are equal. The processors that more
# parts would occupy get blocks of fewer ranks instead, which read x once more each. A longer K
# may be cut more often: such layers have a shorter N.
_MOST_PARTS_SHORT = 4
_COLUMNS_OF_A_PART = 2048
_RANK_BLOCKS = 4
_MOST_PARTS = 8


def default_shrink(workload: Workload) -> ShrinkConfig:
    """Blocks for `x @ A.T`: enough parts of K to occupy the device, and no more."""
    short = workload.tokens <= SHORT_BATCH
    block_m = _block_m(workload.tokens)
    block_r = _block_r(-(-workload.max_rank // _RANK_BLOCKS) if short else workload.max_rank)
    if workload.item_size == 4:
        # No tensor cores: every thread keeps whole rows of both factors in registers.
        block_m, block_r = min(block_m, 32), min(block_r, 32)
        block_k = 64 if block_m == MIN_BLOCK else 32
    elif block_m == MIN_BLOCK and block_r <= 32:
        block_k = 256  # few rows of A are long ones, or too few bytes would be under way
    else:
        block_k = 128 if block_m <= 32 else 64
    programs = workload.slices * -(-workload.max_rank // block_r) * _blocks(workload, block_m)
    # A program of a long batch has many bytes under way by itself.
    enough = workload.processors * (_PROGRAMS_PER_PROCESSOR if short else 1)
    wanted = power_of_two_down(enough // programs)
    most = _most_parts(workload.width) if short else _MOST_PARTS
    most = min(most, workload.width // _SHORTEST_PART)
    return ShrinkConfig(
        block_m=block_m,
        block_r=block_r,
        block_k=min(block_k, max(MIN_BLOCK, power_of_two_up(workload.width))),
        split_k=max(1, min(wanted, most)),
        num_warps=4,
        num_stages=3,
    )


def default_expand(workload: Workload) -> ExpandConfig:
    """Blocks for `h @ B.T`: narrower ones where few columns would leave processors idle."""
    block_m = _block_m(workload.tokens)
    if workload.item_size == 4:
        return ExpandConfig(
            block_m=block_m,
            block_n=32,
            block_r=MIN_BLOCK,
            num_warps=8 if block_m == 64 else 4,
            num_stages=2,
        )
    return ExpandConfig(
        block_m=block_m,
        block_n=_block_n(workload, block_m),
        # Long batches are read once, so the widest block; short ones rather have more programs
        # at a time on a processor, and a high rank takes two steps.
        block_r=min(64 if block_m >= 64 else 32, _block_r(workload.max_rank)),
        num_warps=8 if block_m >= 32 else 4,
        num_stages=2,
    )


def invariant_shrink(workload: Workload) -> ShrinkConfig:
    """Blocks that depend on the weights only, so that a row's sum is cut the same everywhere."""
    wide = workload.item_size == 4
    return ShrinkConfig(
        block_m=32 if wide else 64,
        block_r=min(32 if wide else 64, _block_r(workload.max_rank)),
        block_k=32 if wide else 64,
        split_k=max(1, min(_most_parts(workload.width), power_of_two_down(workload.width // 1024))),
        num_warps=4,
        num_stages=3,
    )


def invariant_expand(workload: Workload) -> ExpandConfig:
    """As `invariant_shrink`, for the second half."""
    return ExpandConfig(
        block_m=64,
        block_n=32 if workload.item_size == 4 else 64,
        block_r=MIN_BLOCK if workload.item_size == 4 else min(32, _block_r(workload.max_rank)),
        num_warps=8,
        num_stages=2,
    )


def _block_m(tokens: int) -> int:
    for most_tokens, block_m in _BLOCK_M:
        if tokens <= most_tokens:
            return block_m
    return _LARGEST_BLOCK_M


def _block_r(max_rank: int) -> int:
    return min(_LARGEST_BLOCK_R, max(MIN_BLOCK, power_of_two_up(max_rank)))


def _most_parts(width: int) -> int:
    return min(_MOST_PARTS, max(_MOST_PARTS_SHORT, width // _COLUMNS_OF_A_PART))


def _block_n(workload: Workload, block_m: int) -> int:
    blocks, processors = _blocks(workload, block_m), workload.processors
    # A short batch may have fewer blocks of tokens than assumed.
    many = processors * (_PROGRAMS_PER_PROCESSOR if workload.tokens <= SHORT_BATCH else 1)
    if workload.width // 128 * blocks >= many:
        return 128
    return 64 if workload.width // 64 * blocks >= processors else 32


def _blocks(workload: Workload, block_m: int) -> int:
    return max(workload.tokens // block_m, min(workload.tokens, _ASSUMED_BLOCKS))
