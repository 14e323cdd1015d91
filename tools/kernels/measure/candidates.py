"""Configurations worth timing for a workload.

All combinations would be thousands, and each has to be compiled. A candidate differs from the
computed default in at most `CHANGES` values, has no more rows, columns or ranks in a block than
the workload can fill, and fits the card's shared memory and registers as far as that can be said
without compiling it. The rest is said by the compiler: see `trials`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import combinations, product
from typing import TypeVar

from multilora_kernels.configs import (
    MIN_BLOCK,
    ExpandConfig,
    ShrinkConfig,
    Workload,
    default_expand,
    default_shrink,
)
from multilora_kernels.configs.model import power_of_two_up
from tools.kernels.measure.batches import PLAN_TILE_ROWS

CHANGES = 2
"""Values in which a candidate may differ from the default."""

_BLOCKS = (16, 32, 64, 128, 256)
_SPLITS = (1, 2, 4, 8, 16)
_WARPS = (2, 4, 8)
_STAGES = (1, 2, 3, 4)
_SHORTEST_PART = 128  # columns of x in a part of K; shorter ones are all launch and no work
_ACCUMULATORS = 128  # float32 sums of a thread, of the 255 registers that it can have

_Config = TypeVar("_Config", ShrinkConfig, ExpandConfig)


def shrink_candidates(workload: Workload, shared_memory: int) -> list[ShrinkConfig]:
    """Candidates for the first half, the default not among them.

    Args:
        workload: What they are for.
        shared_memory: Bytes that a program can have.
    """
    values = {
        "block_m": _up_to(min(PLAN_TILE_ROWS, workload.tokens)),
        "block_r": _up_to(workload.max_rank),
        "block_k": _up_to(workload.width),
        "split_k": tuple(n for n in _SPLITS if n == 1 or workload.width // n >= _SHORTEST_PART),
        "num_warps": _WARPS,
        "num_stages": _STAGES,
    }

    def fits(config: ShrinkConfig) -> bool:
        staged = config.block_k * (config.block_m + config.block_r) * workload.item_size
        return (
            staged * config.num_stages <= shared_memory
            and config.block_k * config.split_k < 2 * power_of_two_up(workload.width)
            and _fits_registers(config.block_m * config.block_r, config.num_warps)
        )

    return [c for c in _around(default_shrink(workload), values) if fits(c)]


def expand_candidates(workload: Workload, shared_memory: int) -> list[ExpandConfig]:
    """Candidates for the second half, the default not among them; see `shrink_candidates`."""
    values = {
        "block_m": _up_to(min(PLAN_TILE_ROWS, workload.tokens)),
        "block_n": _up_to(workload.width),
        "block_r": _up_to(workload.max_rank),
        "num_warps": _WARPS,
        "num_stages": _STAGES,
    }

    def fits(config: ExpandConfig) -> bool:
        # Planes of h are float32, whatever the weights are.
        staged = config.block_r * (4 * config.block_m + workload.item_size * config.block_n)
        return staged <= shared_memory and _fits_registers(
            config.block_m * config.block_n, config.num_warps
        )

    return [c for c in _around(default_expand(workload), values) if fits(c)]


def _up_to(most: int) -> tuple[int, ...]:
    """Lengths of blocks that so many rows or columns can fill, the shortest one in any case."""
    return tuple(n for n in _BLOCKS if n <= max(MIN_BLOCK, power_of_two_up(most)))


def _fits_registers(sums: int, num_warps: int) -> bool:
    threads = 32 * num_warps
    return threads <= sums <= _ACCUMULATORS * threads


def _around(default: _Config, values: dict[str, tuple[int, ...]]) -> Iterator[_Config]:
    """Configurations of these values that differ from the default in 1 to `CHANGES` of them."""
    base = asdict(default)
    others = {key: [v for v in own if v != base[key]] for key, own in values.items()}
    for count in range(1, CHANGES + 1):
        for keys in combinations(others, count):
            for chosen in product(*(others[key] for key in keys)):
                yield type(default)(**(base | dict(zip(keys, chosen, strict=True))))
