"""These kernels: both launches, with the blocks that the computed defaults choose."""

from __future__ import annotations

import math
from dataclasses import replace

from multilora_kernels.configs import (
    ExpandConfig,
    ShrinkConfig,
    Workload,
    default_expand,
    default_shrink,
)
from multilora_kernels.configs.config_facts import power_of_two_down, power_of_two_up
from tools.kernels.measure.batches import Layer
from tools.kernels.modelled.cases import ITEM, SLOTS, Batch
from tools.kernels.modelled.machine import (
    CACHE_US,
    CHAIN,
    GPU,
    MEMORY_US,
    OVERLAPPED_US,
    START_US,
    Kernel,
    Variant,
)

Steps = dict[int, dict[tuple[int, int], tuple[float, float]]]
"""By the server's highest rank, then block of ranks and columns: a warp's instructions and cycles.

Those of docs/gpu.md's table of main loops, for one step. Four warps are a program of a short batch.
"""
SHRINK_STEP: Steps = {
    16: {(16, 256): (154, 626)},
    32: {(32, 256): (172, 685), (16, 256): (151, 645)},
    64: {(64, 128): (175, 487), (32, 128): (118, 390), (16, 256): (162, 632)},
    256: {(64, 128): (183, 567), (32, 128): (133, 439), (16, 256): (161, 644)},
}
EXPAND_STEP: Steps = {
    16: {(16, 128): (89.5, 247.5), (16, 64): (51, 128)},
    32: {(32, 128): (141, 304), (16, 128): (115, 276)},
    64: {(64, 64): (82.5, 282), (32, 128): (114, 308.5), (16, 128): (90, 223.5)},
    256: {(64, 64): (102, 287), (32, 128): (132, 307), (16, 128): (106, 264)},
}
_MORE_RANKS = (46, 161)  # an expand step's, for each further block of 64 ranks, at rank 256
_PLANE = {64: (17, 33), 32: (10, 20), 16: (10, 20)}  # to add up one plane of h
_BEFORE = {16: (300, 650), 32: (360, 800), 64: (450, 1000)}  # before the first step
_WARPS = 4
_EARLY_RANK = 64  # up to which the shrink leaves registers to programs that are placed early

FEW_ROWS = 4
_LANES, _OPERATION_US, _SUM_US = 128, 0.0006, 0.15


def ours_us(layer: Layer, batch: Batch, gpu: GPU, variant: Variant) -> float:
    """Microseconds of both launches."""
    first = START_US + _shrink(layer, batch, gpu).time_us(gpu, 0.5)
    return variant.ours * (first + _second_us(layer, batch, gpu))


def candidates_us(layer: Layer, batch: Batch, gpu: GPU) -> dict[str, float]:
    """Microseconds with each change that the tuner tries; without those not for this batch.

    `early`: the shrink's programs are placed while the kernel before ends. The expand's are then
    placed when the shrink has ended, so a start is saved and no load. `vector_rows`: the shrink
    multiplies without tensor cores. A multiprocessor does `_LANES` operations in `_OPERATION_US`:
    one for each row and value of A, and one to widen that value; adding up takes `_SUM_US`.
    """
    shrink, second = _shrink(layer, batch, gpu), _second_us(layer, batch, gpu)
    found = {"early": OVERLAPPED_US + shrink.time_us(gpu, 0.5) + second}
    if batch.tokens <= FEW_ROWS * batch.adapters:
        config = default_shrink(_workload(layer, batch, layer.inputs, gpu))
        pieces = batch.adapters * len(layer.outputs) * config.split_k
        share = math.ceil(pieces / (config.per_processor * gpu.processors))
        chunk = math.ceil(layer.inputs / config.split_k)
        block = power_of_two_up(max(16, int(_mean_rank(batch))))
        operations = share * chunk * block * (power_of_two_up(math.ceil(batch.rows)) + 1)
        resident = max(1.0, min(pieces, config.per_processor * gpu.processors) / gpu.processors)
        work = resident * operations / _LANES * _OPERATION_US + share * _SUM_US
        _, before = _before(batch)
        loads = shrink.loads_us + CHAIN * before / gpu.clock + work
        vector = replace(shrink, loads_us=loads, cycles=0, instructions=0)
        found["vector_rows"] = START_US + vector.time_us(gpu, 0.5) + second
    return found


def _second_us(layer: Layer, batch: Batch, gpu: GPU) -> float:
    hidden = batch.max_rank <= _EARLY_RANK
    expand = _expand(layer, batch, gpu)
    if hidden:  # half of what comes before the first step runs beside the shrink's end
        expand = replace(expand, cycles=expand.cycles - _before(batch)[1] / 2)
    return (OVERLAPPED_US if hidden else START_US) + expand.time_us(gpu, 0.5)


def _shrink(layer: Layer, batch: Batch, gpu: GPU) -> Kernel:
    """A piece is a part of K of one slice."""
    slices = len(layer.outputs)
    config = default_shrink(_workload(layer, batch, layer.inputs, gpu))
    per_part = slices * config.split_k
    pieces = batch.adapters * math.ceil(batch.rows / config.block_m) * per_part
    programs = min(_most_parts(batch, config) * per_part, config.per_processor * gpu.processors)
    working = min(pieces, programs)
    share = math.ceil(pieces / programs)
    chunk = math.ceil(layer.inputs / config.split_k)
    runs = math.ceil(share / config.split_k)
    cycles, instructions, step_bytes = 0.0, 0.0, 0.0
    ranks = batch.rank_of_each()
    for rank in ranks:
        blocks = _blocks_of(rank, config.block_r)
        for block in blocks:
            wide = config.block_k * (config.block_m + config.block_r) // (config.block_m + block)
            step = min(power_of_two_down(wide), power_of_two_up(chunk))
            step_instructions, step_cycles = _step(SHRINK_STEP, batch.max_rank, block, step)
            steps = math.ceil(chunk / step)
            instructions += steps * step_instructions
            cycles += steps * step_cycles / len(ranks)
            step_bytes += min(step, chunk) * min(rank, block) * ITEM / (len(blocks) * len(ranks))
    before = _before(batch)
    parts = pieces / batch.adapters  # of each adapter
    return Kernel(
        programs=programs,
        working=working,
        loads_us=runs * (2 * CACHE_US + MEMORY_US) + CACHE_US,
        cycles=before[1] + share * cycles,
        instructions=_WARPS * (working * before[0] + parts * instructions),
        moved=sum(ranks) * layer.inputs * slices * ITEM,
        under_way=working * 2 * step_bytes,
    )


def _expand(layer: Layer, batch: Batch, gpu: GPU) -> Kernel:
    """A piece is a block of columns; runs of them share the plan, the rank and h."""
    slices, width = len(layer.outputs), sum(layer.outputs)
    split_k = default_shrink(_workload(layer, batch, layer.inputs, gpu)).split_k
    config = default_expand(_workload(layer, batch, width, gpu))
    parts = batch.adapters * math.ceil(batch.rows / config.block_m)
    per_part = sum(math.ceil(n / config.block_n) for n in layer.outputs)
    programs = min(_most_parts(batch, config) * per_part, config.per_processor * gpu.processors)
    pieces = parts * per_part
    working = min(pieces, programs)
    share = math.ceil(pieces / programs)
    runs = math.ceil(share * slices / per_part) if share > per_part / slices else 1
    rows = min(batch.rows, config.block_m)
    ranks = batch.rank_of_each()
    cycles, instructions, block_bytes, planes = 0.0, 0.0, 0.0, 0.0
    for rank in ranks:
        blocks = _blocks_of(rank, config.block_r)
        block = blocks[0]
        wider = max(1, config.block_r // block) if config.block_m == 16 else 1
        columns = config.block_n * min(2, wider)
        step = _step(EXPAND_STEP, batch.max_rank, block, columns)
        more = len(blocks) - 1
        plane = _PLANE[block]
        steps = math.ceil(share * config.block_n / columns)
        cycles += steps * (step[1] + more * _MORE_RANKS[1])
        cycles += runs * len(blocks) * split_k * plane[1]
        all_steps = pieces / batch.adapters * config.block_n / columns
        instructions += all_steps * (step[0] + more * _MORE_RANKS[0])
        readings = working * runs / batch.adapters
        instructions += readings * len(blocks) * split_k * plane[0]
        planes += readings * rows * rank * 4 * split_k
        block_bytes += columns * min(rank, block) * ITEM
    before = _before(batch)
    return Kernel(
        programs=programs,
        working=working,
        loads_us=runs * 2 * CACHE_US + MEMORY_US,
        cycles=before[1] + cycles / len(ranks),
        instructions=_WARPS * (working * before[0] + instructions),
        moved=(sum(ranks) + 2 * batch.tokens) * width * ITEM,
        under_way=working * (block_bytes / len(ranks) + config.block_n * rows * ITEM),
        cached=planes,
    )


def _blocks_of(rank: int, block_r: int) -> list[int]:
    block = min(block_r, power_of_two_up(max(16, rank)))
    return [block] * math.ceil(rank / block)


def _step(steps: Steps, max_rank: int, block: int, columns: int) -> tuple[float, float]:
    """The counts of a step, from the widest counted step of the block if it was not counted."""
    counted = steps[min((rank for rank in steps if rank >= max_rank), default=max(steps))]
    if (block, columns) in counted:
        return counted[block, columns]
    widest = max(width for ranks, width in counted if ranks == block)
    instructions, cycles = counted[block, widest]
    return instructions * columns / widest, cycles * columns / widest


def _before(batch: Batch) -> tuple[int, int]:
    return _BEFORE[min(64, power_of_two_up(max(16, batch.max_rank)))]


def _mean_rank(batch: Batch) -> float:
    return sum(batch.rank_of_each()) / batch.adapters


def _most_parts(batch: Batch, config: ShrinkConfig | ExpandConfig) -> int:
    return batch.tokens // config.block_m + min(SLOTS, batch.tokens)


def _workload(layer: Layer, batch: Batch, width: int, gpu: GPU) -> Workload:
    return Workload(
        tokens=power_of_two_up(batch.tokens),
        width=width,
        slices=len(layer.outputs),
        max_rank=batch.max_rank,
        item_size=ITEM,
        architecture="sm_90",
        processors=gpu.processors,
    )
