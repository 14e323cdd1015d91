"""Configurations worth timing for a workload.

All combinations would be thousands, and each has to be compiled. A candidate differs from the
computed default in at most `CHANGES` values, has no more rows, columns or ranks in a block than
the workload can fill, and fits the card's shared memory and registers as far as that can be said
without compiling it. The rest is said by the compiler: see `trials`. Of those there are, the ones
with a single change come first, then the nearest ones, and `LIMIT` are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import combinations, groupby, product
from typing import TypeVar

from multilora_kernels.configs import (
    MIN_BLOCK,
    ExpandConfig,
    ShrinkConfig,
    Workload,
    default_expand,
    default_shrink,
)
from multilora_kernels.configs.config_facts import power_of_two_up
from multilora_kernels.configs.defaults import SHORT_BATCH
from multilora_kernels.plan import DEFAULT_TILE_ROWS

CHANGES = 2
"""Values in which a candidate may differ from the default."""

LIMIT = 30
"""Candidates of a workload; each has to be compiled for every shape of a layer."""

_BLOCKS = (16, 32, 64, 128, 256)
_SPLITS = (1, 2, 4, 8, 16)
_WARPS = (2, 4, 8)
_STAGES = (1, 2, 3, 4)
_PER_PROCESSOR = (1, 2, 3, 4, 6, 8)
_VECTOR_ROWS = (0, 1, 2, 4)
_WITH_EARLY_STARTS = ("sm_90", "sm_100", "sm_120")
_SHORTEST_PART = 128  # columns of x in a part of K; shorter ones are all launch and no work
_REGISTERS, _THREADS = 65_536, 2048  # of a multiprocessor
_RESERVED = 1024  # bytes of shared memory that a program takes besides its own

_Config = TypeVar("_Config", ShrinkConfig, ExpandConfig)


def shrink_candidates(workload: Workload, shared_memory: int) -> list[ShrinkConfig]:
    """Candidates for the first half, the default not among them.

    Args:
        workload: What they are for.
        shared_memory: Bytes that a program can have.
    """
    values = {
        "block_m": _up_to(min(DEFAULT_TILE_ROWS, workload.tokens)),
        "block_r": _up_to(workload.max_rank),
        "block_k": _up_to(workload.width),
        "split_k": tuple(n for n in _SPLITS if n == 1 or workload.width // n >= _SHORTEST_PART),
        "num_warps": _WARPS,
        "num_stages": _STAGES,
        "per_processor": _PER_PROCESSOR,
        "vector_rows": _VECTOR_ROWS if workload.tokens <= SHORT_BATCH else (),
        "early": (False, True) if workload.architecture in _WITH_EARLY_STARTS else (),
    }

    def fits(config: ShrinkConfig) -> bool:
        step = config.block_k * (config.block_m + config.block_r) * workload.item_size
        return (
            step * config.num_stages <= shared_memory
            and config.block_k * config.split_k < 2 * power_of_two_up(workload.width)
            # What is being multiplied has room of its own only on some cards.
            and _fits_processor(config, step * max(1, config.num_stages - 1), shared_memory)
            and _fits_registers(config.block_m * config.block_r, 0, config)
        )

    return _nearest(default_shrink(workload), values, fits)


def expand_candidates(workload: Workload, shared_memory: int) -> list[ExpandConfig]:
    """Candidates for the second half, the default not among them; see `shrink_candidates`."""
    default = default_expand(workload)
    values = {
        "block_m": _up_to(min(DEFAULT_TILE_ROWS, workload.tokens)),
        "block_n": _up_to(workload.width),
        "block_r": _up_to(workload.max_rank),
        "num_warps": _WARPS,
        # Its only pipeline is over blocks of ranks.
        "num_stages": _STAGES if workload.max_rank > default.block_r else (),
        "per_processor": _PER_PROCESSOR,
    }

    def fits(config: ExpandConfig) -> bool:
        # Planes of h are float32, whatever the weights are.
        staged = config.block_r * (4 * config.block_m + workload.item_size * config.block_n)
        # Kept in registers: h, this block of B and the next one.
        factors = config.block_m + config.block_n * workload.item_size // 2
        kept = config.block_r * factors
        sums = config.block_m * config.block_n
        return staged <= shared_memory and _fits_registers(sums, kept, config)

    return _nearest(default, values, fits)


def _up_to(most: int) -> tuple[int, ...]:
    """Lengths of blocks that so many rows or columns can fill, the shortest one in any case."""
    return tuple(n for n in _BLOCKS if n <= max(MIN_BLOCK, power_of_two_up(most)))


def _fits_registers(sums: int, kept: int, config: ShrinkConfig | ExpandConfig) -> bool:
    """Whether sums and what is kept beside them leave the compiler most of the registers.

    Args:
        sums: Of a block, float32.
        kept: Registers that a program needs all the time, besides.
        config: The blocks.
    """
    threads = 32 * config.num_warps
    registers = min(256, _REGISTERS // (config.per_processor * threads))
    return threads <= sums and 8 * (sums + kept) <= 3 * registers * threads


def _fits_processor(config: ShrinkConfig, staged: int, shared_memory: int) -> bool:
    """Whether a multiprocessor has the threads and the shared memory for all of its programs."""
    programs = config.per_processor
    return (
        32 * config.num_warps * programs <= _THREADS
        and (staged + _RESERVED) * programs <= shared_memory + _RESERVED
    )


def _nearest(
    default: _Config, values: dict[str, tuple[int, ...]], fits: Callable[[_Config], bool]
) -> list[_Config]:
    """The first `LIMIT` of all that fit; of equally near ones they are spread evenly."""
    found = [each for each in _around(default, values) if fits(each[1])]
    chosen: list[_Config] = []
    for _, equals in groupby(sorted(found, key=lambda each: each[0]), lambda each: each[0]):
        group = [config for _, config in equals]
        room = min(LIMIT - len(chosen), len(group))
        chosen += [group[i * len(group) // room] for i in range(room)]
    return chosen


def _around(
    default: _Config, values: dict[str, tuple[int, ...]]
) -> Iterator[tuple[tuple[int, int], _Config]]:
    """Configurations of these values that differ from the default in 1 to `CHANGES` of them.

    With how near each is: the number of changes, and the steps that values have moved.
    """
    base = asdict(default)
    others = {key: _steps(own, base[key]) for key, own in values.items()}
    for count in range(1, CHANGES + 1):
        for keys in combinations(others, count):
            for chosen in product(*(others[key] for key in keys)):
                changed = {key: value for key, (value, _) in zip(keys, chosen, strict=True)}
                steps = sum(step for _, step in chosen)
                yield (count, steps), type(default)(**(base | changed))


def _steps(values: tuple[int, ...], base: int) -> list[tuple[int, int]]:
    """Each other value, with its steps from `base` in the order of all."""
    order = sorted({*values, base})
    at = order.index(base)
    return [(v, abs(i - at)) for i, v in enumerate(order) if v != base]
