"""Layers some of whose rows every tensor-parallel rank has, beside its share of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2


@dataclass(frozen=True)
class RepeatedRows:
    """Which rows a rank has of a layer.

    Attributes:
        outputs: Of the layer in a checkpoint.
        rows: Those of the checkpoint that this rank has, in its order.
        rank: This rank's number.
    """

    outputs: int
    rows: torch.Tensor
    rank: int

    def for_cutting(self, b: torch.Tensor) -> torch.Tensor:
        """A B of which vLLM cuts this rank's rows, as it does where ranks have a share of all."""
        own = b[self.rows]
        return torch.cat([own.new_zeros(self.rank * len(own), own.shape[1]), own])


def repeated_rows(model: torch.nn.Module) -> Iterator[tuple[str, RepeatedRows]]:
    """Such layers by name: of states (Mamba 2) that are of one group, which all heads need.

    Args:
        model: Its layers are wrapped for LoRA.
    """
    for block, part in model.named_modules():
        layer: Any = getattr(part, "in_proj", None)
        base = getattr(layer, "base_layer", None)
        if not isinstance(part, MambaMixer2) or base is None:
            continue
        if isinstance(base, MergedColumnParallelLinear):  # ranks have whole groups
            continue
        inner, heads, of_group = part.intermediate_size, part.num_heads, 2 * part.ssm_state_size
        rank, ranks = layer.tp_rank, layer.tp_size
        own = torch.arange(rank * inner // ranks, (rank + 1) * inner // ranks)
        of_heads = torch.arange(rank * heads // ranks, (rank + 1) * heads // ranks)
        shared = torch.arange(of_group) + 2 * inner
        rows = torch.cat([own, own + inner, shared, of_heads + 2 * inner + of_group])
        yield f"{block}.in_proj", RepeatedRows(2 * inner + of_group + heads, rows, rank)
