"""SGLang's kernels: its chunked backend (csgmv) at its best, and the older `qkv_lora_b`.

Counted in transcriptions of their text. The chunked backend's defaults are blocks of 16 rows, 16
ranks and 256 of K, and of 64 columns. https://github.com/sgl-project/sglang/tree/main/benchmark/kernels/lora_csgmv
"""

from __future__ import annotations

import math

from tools.kernels.measure.batches import Layer
from tools.kernels.modelled.cases import ITEM, Batch
from tools.kernels.modelled.machine import CACHE_US, GPU, MEMORY_US, START_US, Kernel

_STEP = (158, 628)  # 256 of K: instructions and cycles of a warp
_BEFORE = (250, 500)
_EXPAND = (444, 936)  # a program of 64 columns at rank 32: two steps of 16 ranks
_EXPAND_STEP = (100, 180)
_QKV_B = {16: (360, 776), 32: (408, 875)}  # a program of 64 columns, by maximum rank
_WARPS, _ROWS, _RANKS, _DEPTH, _COLUMNS = 4, 16, 16, 256, 64
_PARTS = (1, 4, 8, 16)  # into which K may be cut


def chunked_us(
    layer: Layer, batch: Batch, gpu: GPU, issue: float, parts: int, *, compact: bool
) -> float:
    """Microseconds of shrink and expand, and of the sum between them where K is cut.

    Args:
        layer: The layer.
        batch: The batch.
        gpu: The card.
        issue: Instructions a cycle and scheduler.
        parts: Into which K is cut.
        compact: Whether the expand starts programs for columns that are there only.
    """
    slices, width = len(layer.outputs), sum(layer.outputs)
    chunks = batch.adapters * math.ceil(batch.rows / _ROWS)
    per_adapter = chunks / batch.adapters
    ranks = batch.rank_of_each()
    steps = math.ceil(layer.inputs / _DEPTH / parts)
    working = sum(math.ceil(slices * rank / _RANKS) for rank in ranks) * per_adapter * parts
    started = math.ceil(slices * batch.max_rank / _RANKS) * chunks * parts
    shrink = Kernel(
        programs=started,
        working=working,
        loads_us=3 * CACHE_US + MEMORY_US,
        cycles=_BEFORE[1] + steps * _STEP[1],
        instructions=_WARPS * working * (_BEFORE[0] + steps * _STEP[0]),
        moved=sum(ranks) * slices * layer.inputs * ITEM,
        under_way=working * 2 * _RANKS * _DEPTH * ITEM,
    )
    blocks = sum(math.ceil(n / _COLUMNS) for n in layer.outputs)
    started = blocks if compact else math.ceil(max(layer.outputs) / _COLUMNS) * slices
    counts = [
        [whole + (math.ceil(rank / _RANKS) - 2) * step for rank in ranks]
        for whole, step in zip(_EXPAND, _EXPAND_STEP, strict=True)
    ]
    expand = Kernel(
        programs=started * chunks,
        working=blocks * chunks,
        loads_us=2 * CACHE_US + MEMORY_US,
        cycles=max(counts[1]),
        instructions=_WARPS * blocks * per_adapter * sum(counts[0]),
        moved=(sum(ranks) + 2 * batch.tokens) * width * ITEM,
        under_way=blocks * chunks * _COLUMNS * sum(ranks) / len(ranks) * ITEM,
    )
    halves = 2 * START_US + shrink.time_us(gpu, issue) + expand.time_us(gpu, issue)
    return halves + (START_US + CACHE_US if parts > 1 else 0.0)


def best_us(layer: Layer, batch: Batch, gpu: GPU, issue: float) -> float:
    """Microseconds with the best cut of K, and no programs without columns."""
    return min(chunked_us(layer, batch, gpu, issue, parts, compact=True) for parts in _PARTS)


def qkv_b_us(layer: Layer, batch: Batch, gpu: GPU, issue: float) -> float:
    """Microseconds of `qkv_lora_b` without its loop over ranks; its weights lie in the cache."""
    width = sum(layer.outputs)
    instructions, cycles = _QKV_B[batch.max_rank]
    programs = batch.tokens * sum(math.ceil(n / _COLUMNS) for n in layer.outputs)
    kernel = Kernel(
        programs=programs,
        working=programs,
        loads_us=3 * CACHE_US,
        cycles=cycles,
        instructions=_WARPS * programs * instructions,
        moved=0,
        under_way=0,
        cached=batch.tokens * batch.max_rank * width * ITEM,
    )
    return START_US + kernel.time_us(gpu, issue)
