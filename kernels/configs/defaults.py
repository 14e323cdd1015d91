"""Blocks computed from a workload. Not tuned: see README.md beside the kernels."""

from __future__ import annotations

from multilora_kernels.configs.config_facts import (
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
_LOW_BLOCK_R = 32
_HIGH_RANK = 256
_COLUMNS_OF_A_BLOCK = 64

# Nobody on the host knows how many adapters a small batch has. Blocks are chosen as if there were
# so many blocks of tokens: too many parts cost more in planes than they win.
_ASSUMED_BLOCKS = 4
_PROGRAMS_PER_PROCESSOR = 2
_SHORTEST_PART = 256

# A short batch cuts K often: a part is a chain of products, one after the other, and the shorter
# the chain, the earlier it ends. What that costs are planes, which the second half reads again for
# every run of column blocks. There are about as many runs as programs, however many adapters there
# are; so it is batches with many tokens of one adapter that read most, and these are cut less. So
# are layers with few columns over all slices, whose weights are few beside the planes.
_FEW_TOKENS = 32
_COLUMNS_OF_A_PART = 512
_LONG_WIDTH = 8192
_MAX_PARTS_FEW = 16
_MAX_PARTS = 8

# Programs that a multiprocessor is given. Of the first half as many as its shared memory holds:
# that of sm_80, 90 and 100; the 100 KiB of sm_86, 89 and 120; the 64 KiB of a compute unit. Of the
# second half, and where there are no tensor cores, as many as registers do. The compiler's report
# shows that they fit.
_PER_PROCESSOR, _PER_SMALL_PROCESSOR, _PER_COMPUTE_UNIT = 3, 2, 1
_PER_PROCESSOR_SECOND = 3
_PER_PROCESSOR_LOW = 4
_SMALL_PROCESSORS = {"sm_86", "sm_89", "sm_120", "sm_121"}


def default_shrink(workload: Workload) -> ShrinkConfig:
    """Blocks for `x @ A.T`: enough parts of K to occupy the device, and no more."""
    short = workload.tokens <= SHORT_BATCH
    block_m = _block_m(workload.tokens)
    block_r = _block_r(workload.max_rank)
    if workload.item_size == 4:
        # No tensor cores: every thread keeps whole rows of both factors in registers.
        block_m, block_r = min(block_m, 32), min(block_r, 32)
        block_k = 64 if block_m == MIN_BLOCK else 32
    elif block_m == MIN_BLOCK and block_r <= 32:
        block_k = 256  # few rows of A are long ones, or too few bytes would be under way
    else:
        block_k = 128 if block_m <= 32 else 64
    programs = workload.slices * _blocks(workload, block_m)
    # A program of a long batch has many bytes under way by itself.
    enough = workload.processors * (_PROGRAMS_PER_PROCESSOR if short else 1)
    requested = power_of_two_down(enough // programs)
    is_long = short and workload.width > _LONG_WIDTH  # its chains would be, too
    most = _MAX_PARTS_FEW if is_long or workload.tokens <= _FEW_TOKENS else _MAX_PARTS
    most = min(
        most,
        workload.width // _SHORTEST_PART,
        workload.slices * workload.width // _COLUMNS_OF_A_PART,
    )
    return ShrinkConfig(
        block_m=block_m,
        block_r=block_r,
        block_k=min(block_k, max(MIN_BLOCK, power_of_two_up(workload.width))),
        split_k=max(1, min(requested, most)),
        num_warps=4 if short or workload.item_size == 2 else 8,
        num_stages=3,
        per_processor=_per_processor(workload, is_short=short),
    )


def default_expand(workload: Workload) -> ExpandConfig:
    """Blocks for `h @ B.T`."""
    block_m = _block_m(workload.tokens)
    if workload.item_size == 4:
        return ExpandConfig(
            block_m=block_m,
            block_n=32,
            block_r=MIN_BLOCK,
            num_warps=8 if block_m == 64 else 4,
            num_stages=2,
            per_processor=1 if block_m == 64 else _PER_PROCESSOR_SECOND,
        )
    is_short = block_m == MIN_BLOCK
    block_r = _block_r(workload.max_rank)
    # A block of so few ranks needs more columns, or too few bytes of B are under way; on AMD's
    # cards, whose waves have 64 lanes, its loads would be narrow as well.
    is_thin = block_r == MIN_BLOCK and workload.architecture.startswith("gfx")
    is_low = block_r <= _LOW_BLOCK_R and workload.width >= _COLUMNS_OF_A_BLOCK * workload.processors
    return ExpandConfig(
        block_m=block_m,
        # Where an adapter's rank is lower than the server's, the kernel takes more by itself.
        block_n=128 if is_short and (is_thin or is_low) else _COLUMNS_OF_A_BLOCK,
        block_r=block_r,
        num_warps=4 if is_short and workload.max_rank <= _HIGH_RANK else 8,
        num_stages=2,
        per_processor=_per_processor_second(workload, is_short=is_short),
    )


def invariant_shrink(workload: Workload) -> ShrinkConfig:
    """Blocks that depend on the weights only, so that a row's sum is cut the same everywhere."""
    wide = workload.item_size == 4
    # Without the wide tensor-core instructions of sm_90 and sm_100, loops over parts of K, and even
    # more so those over blocks of ranks, take more registers.
    is_small = workload.architecture in _SMALL_PROCESSORS
    is_narrow = is_small or workload.architecture == "sm_80"
    per_processor = _per_processor(workload, is_short=False)
    return ShrinkConfig(
        block_m=32 if wide else 64,
        block_r=min(32 if wide else 64, _block_r(workload.max_rank)),
        block_k=32 if wide else 64,
        split_k=max(1, min(_MAX_PARTS, power_of_two_down(workload.width // 1024))),
        num_warps=8 if is_small and workload.max_rank > _LARGEST_BLOCK_R else 4,
        num_stages=3,
        per_processor=min(2, per_processor) if is_narrow else per_processor,
    )


def invariant_expand(workload: Workload) -> ExpandConfig:
    """As `invariant_shrink`, for the second half."""
    return ExpandConfig(
        block_m=64,
        block_n=32 if workload.item_size == 4 else 64,
        block_r=MIN_BLOCK if workload.item_size == 4 else _block_r(workload.max_rank),
        num_warps=8,
        num_stages=2,
        per_processor=1,
    )


def _block_m(tokens: int) -> int:
    for most_tokens, block_m in _BLOCK_M:
        if tokens <= most_tokens:
            return block_m
    return _LARGEST_BLOCK_M


def _block_r(max_rank: int) -> int:
    return min(_LARGEST_BLOCK_R, max(MIN_BLOCK, power_of_two_up(max_rank)))


def _per_processor(workload: Workload, *, is_short: bool) -> int:
    if workload.architecture.startswith("gfx"):
        return _PER_COMPUTE_UNIT
    if workload.architecture in _SMALL_PROCESSORS:
        # Blocks of 32 ranks are the longest, and take most shared memory.
        return _PER_SMALL_PROCESSOR if is_short and _block_r(workload.max_rank) != 32 else 1
    # A rank of more than one block takes more registers, as do products without tensor cores.
    is_large = workload.max_rank > _LARGEST_BLOCK_R
    is_large &= not is_short or workload.architecture == "sm_80"
    return 2 if is_large or workload.item_size == 4 else _PER_PROCESSOR


def _per_processor_second(workload: Workload, *, is_short: bool) -> int:
    # A rank of more than one block takes more registers, and a compute unit has fewer.
    is_amd = workload.architecture.startswith("gfx")
    is_crowded = workload.max_rank > _LARGEST_BLOCK_R or is_amd
    # All of h's blocks are in registers.
    if workload.max_rank > (_HIGH_RANK // 2 if is_amd else _HIGH_RANK):
        return 1
    if not is_short:
        return 1 if is_crowded else 2
    # So do narrow accesses to y's rows.
    if is_crowded or workload.width % 16 != 0:
        return 2
    if (block_r := _block_r(workload.max_rank)) <= _LOW_BLOCK_R:
        # Slots whose ranks are contiguous take a few registers more.
        is_small = workload.architecture in _SMALL_PROCESSORS
        return 3 if is_small and block_r == _LOW_BLOCK_R else _PER_PROCESSOR_LOW
    # Few tokens have more planes, and so fewer programs that each read them.
    return 2 if workload.tokens <= _FEW_TOKENS else _PER_PROCESSOR_SECOND


def _blocks(workload: Workload, block_m: int) -> int:
    return max(workload.tokens // block_m, min(workload.tokens, _ASSUMED_BLOCKS))
