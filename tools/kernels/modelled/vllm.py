"""vLLM 0.32's kernels: a launch that clears h, shrink and expand.

Fused layers load weights and y two bytes at a time. Of a program's cycles there are half as many
instructions, as counted in the expand of gate_up.
"""

from __future__ import annotations

import math

from multilora_kernels.configs.config_facts import power_of_two_up
from tools.kernels.measure.batches import Layer
from tools.kernels.modelled.cases import ITEM, SLOTS, Batch
from tools.kernels.modelled.machine import CACHE_US, GPU, MEMORY_US, START_US, Kernel

_SHRINK = {True: 2626, False: 1637}  # cycles of a program with 256 of K; fused or not
_PAST_END = (310, 717)  # a part of K behind K's end
_EXPAND = {1: 1634, 2: 3681, 3: 4008}  # cycles of a program by slices, at ranks up to 32
_EXPAND_STEP = 104  # for 32 ranks more
_LOADS_US = 5 * CACHE_US + 2 * MEMORY_US  # adapter, its tokens, their start, row, pointer; B; y
_SHARE_OF_COLUMNS = 0.85  # of an expand program's cycles; the rest does not grow with its columns
_PER_CYCLE = 0.5
_WARPS, _ROWS, _RANKS, _DEPTH = 4, 32, 16, 256
_PARTS, _LONG = 64, 128  # into which K is cut; tokens from which it is cut into fewer
_EXPAND_ROWS = 64
_TUNED_PARTS, _TUNED_COLUMNS = (4, 8, 16, 32, 64), (16, 32, 64, 128, 256)


def default_us(layer: Layer, batch: Batch, gpu: GPU, issue: float) -> float:
    """Microseconds with vLLM's defaults: a grid over all slots, and its own blocks."""
    if batch.tokens >= _LONG:
        raise ValueError(f"vLLM's defaults are modelled up to {_LONG - 1} tokens: {batch.tokens}")
    shrink = _shrink(layer, batch, SLOTS + 1, _PARTS)
    expand = expand_kernel(layer, batch, SLOTS + 1, _columns(layer))
    return _three_us(shrink, expand, gpu, issue)


def tuned_us(layer: Layer, batch: Batch, gpu: GPU, issue: float) -> float:
    """Microseconds with graphs for the adapters in use, and the best of several blocks."""
    slots = min(power_of_two_up(batch.adapters) + 1, SLOTS + 1)
    shrinks = [_shrink(layer, batch, slots, parts) for parts in _TUNED_PARTS]
    expands = [expand_kernel(layer, batch, slots, columns) for columns in _TUNED_COLUMNS]
    return min(_three_us(a, b, gpu, issue) for a in shrinks for b in expands)


def _three_us(shrink: Kernel, expand: Kernel, gpu: GPU, issue: float) -> float:
    # None starts early: that needs vLLM's second stream.
    return 3 * START_US + shrink.time_us(gpu, issue) + expand.time_us(gpu, issue)


def _columns(layer: Layer) -> int:
    return 64 if len(layer.outputs) > 1 else 128


def _shrink(layer: Layer, batch: Batch, slots: int, parts: int) -> Kernel:
    slices = len(layer.outputs)
    blocks = math.ceil(batch.rows / _ROWS) * math.ceil(batch.max_rank / _RANKS) * slices
    steps = math.ceil(layer.inputs / (parts * _DEPTH))
    full = min(parts, math.ceil(layer.inputs / (steps * _DEPTH)))
    live = blocks * batch.adapters
    one = _SHRINK[slices > 1]
    cycles = one + (steps - 1) * (one - _PAST_END[1])
    instructions = live * (full * cycles * _PER_CYCLE + (parts - full) * _PAST_END[0])
    grid = math.ceil(batch.tokens / _ROWS) * math.ceil(batch.max_rank / _RANKS) * slices
    return Kernel(
        programs=parts * grid * slots,
        working=live * parts,
        loads_us=5 * CACHE_US + MEMORY_US,
        cycles=cycles,
        instructions=_WARPS * instructions,
        moved=batch.adapters * batch.max_rank * layer.inputs * slices * ITEM,
        under_way=live * full * _RANKS * min(_DEPTH, layer.inputs) * ITEM,
    )


def expand_kernel(layer: Layer, batch: Batch, slots: int, columns: int) -> Kernel:
    """The expand.

    Args:
        layer: The layer.
        batch: The batch.
        slots: Slots that the grid has programs for.
        columns: Of a program.
    """
    slices, width = len(layer.outputs), sum(layer.outputs)
    cycles: float = _EXPAND[slices] + (math.ceil(batch.max_rank / 32) - 1) * _EXPAND_STEP
    grows = columns / _columns(layer)
    cycles *= 1 - _SHARE_OF_COLUMNS + _SHARE_OF_COLUMNS * grows
    live = sum(math.ceil(n / columns) for n in layer.outputs)
    live *= batch.adapters * math.ceil(batch.rows / _EXPAND_ROWS)
    per_slice = math.ceil(max(layer.outputs) / columns)
    return Kernel(
        programs=math.ceil(batch.tokens / _EXPAND_ROWS) * per_slice * slices * slots,
        working=live,
        loads_us=_LOADS_US,
        cycles=cycles,
        instructions=_WARPS * live * cycles * _PER_CYCLE,
        moved=(batch.adapters * batch.max_rank + 2 * batch.tokens) * width * ITEM,
        under_way=live * columns * (min(batch.max_rank, 32) + min(batch.rows, 64)) * ITEM,
    )
