"""Layers that compute the two halves of a product separately, with communication in between."""

from __future__ import annotations

from typing import Any

from vllm.lora.layers import (
    ColumnParallelLinearWithShardedLoRA,
    MergedColumnParallelLinearWithShardedLoRA,
    MergedQKVParallelLinearWithShardedLoRA,
    QKVParallelLinearWithShardedLoRA,
    RowParallelLinearWithShardedLoRA,
)

_SHARDED = (
    ColumnParallelLinearWithShardedLoRA,
    MergedColumnParallelLinearWithShardedLoRA,
    MergedQKVParallelLinearWithShardedLoRA,
    QKVParallelLinearWithShardedLoRA,
    RowParallelLinearWithShardedLoRA,
)


def is_sharded(layer: object) -> bool:
    """Whether a layer is one of those of `--fully-sharded-loras`, on any number of ranks."""
    return isinstance(layer, _SHARDED)


def first_column(layer: Any) -> int:
    """Where a sharded layer's own part of the outputs begins."""
    if isinstance(layer, RowParallelLinearWithShardedLoRA):
        return int(layer.tp_rank * layer.lora_b_stacked[0].shape[-2])
    return 0
