"""Both halves of a product as launches, with the configuration chosen from shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multilora_kernels.configs import Workload, choose_expand, choose_shrink
from multilora_kernels.configs.config_facts import power_of_two_up
from multilora_kernels.factors import OutputFactors
from multilora_kernels.triton.expand import prepare_expand
from multilora_kernels.triton.launch import Batch, Launch
from multilora_kernels.triton.shrink import prepare_shrink


def shrink_launch(
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    batch: Batch,
    scale: float,
    kept: torch.dtype | None = None,
    sharers: int = 1,
) -> tuple[torch.Tensor, Launch]:
    """The first half; see `prepare_shrink`."""
    width, max_rank = lora_a[0].size(-1), lora_a[0].size(-2)
    workload = _workload(x.size(0) * sharers, x, lora_a, width, max_rank, batch)
    config = choose_shrink(workload, batch_invariant=batch.batch_invariant)
    return prepare_shrink(x, lora_a, batch, scale, config, kept, sharers)


def expand_launch(
    y: torch.Tensor,
    planes: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    batch: Batch,
    offset: int,
    add_inputs: bool,
    *,
    after_shrink: bool,
    factors: OutputFactors | None = None,
) -> Launch:
    """The second half; see `prepare_expand`."""
    width, max_rank = sum(b.size(-2) for b in lora_b), lora_b[0].size(-1)
    workload = _workload(y.size(0), y, lora_b, width, max_rank, batch)
    config = choose_expand(workload, batch_invariant=batch.batch_invariant)
    return prepare_expand(
        y,
        planes,
        lora_b,
        batch,
        offset,
        add_inputs,
        config,
        after_shrink=after_shrink,
        factors=factors,
    )


def _workload(
    tokens: int,
    activations: torch.Tensor,
    weights: Sequence[torch.Tensor],
    width: int,
    max_rank: int,
    batch: Batch,
) -> Workload:
    return Workload(
        tokens=power_of_two_up(tokens),
        width=width,
        slices=len(weights),
        max_rank=max_rank,
        item_size=max(activations.element_size(), weights[0].element_size()),
        architecture=batch.facts.architecture,
        processors=batch.facts.processors,
    )
