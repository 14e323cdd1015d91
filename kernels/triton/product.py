"""Both halves of a product as launches, with the configuration chosen from shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multilora_kernels.configs import Workload, choose_expand, choose_shrink
from multilora_kernels.configs.model import power_of_two_up
from multilora_kernels.plan import PlanLayout
from multilora_kernels.triton.expand import prepare_expand
from multilora_kernels.triton.launch import DeviceFacts, Launch
from multilora_kernels.triton.shrink import prepare_shrink


def shrink_launch(
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    scale: float,
    batch_invariant: bool,
    facts: DeviceFacts,
) -> tuple[torch.Tensor, Launch]:
    """The first half; see `prepare_shrink`."""
    a = lora_a[0]
    item_size = max(x.element_size(), a.element_size())
    workload = _workload(x.size(0), a.size(-1), len(lora_a), a.size(-2), item_size, facts)
    config = choose_shrink(workload, batch_invariant=batch_invariant)
    return prepare_shrink(x, lora_a, ranks, plan, layout, scale, config, facts)


def expand_launch(
    y: torch.Tensor,
    planes: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    offset: int,
    add_inputs: bool,
    batch_invariant: bool,
    facts: DeviceFacts,
    *,
    after_shrink: bool,
) -> Launch:
    """The second half; see `prepare_expand`."""
    b = lora_b[0]
    item_size = max(y.element_size(), b.element_size())
    width = sum(each.size(-2) for each in lora_b)
    workload = _workload(y.size(0), width, len(lora_b), b.size(-1), item_size, facts)
    config = choose_expand(workload, batch_invariant=batch_invariant)
    return prepare_expand(
        y,
        planes,
        lora_b,
        ranks,
        plan,
        layout,
        offset,
        add_inputs,
        config,
        facts,
        after_shrink=after_shrink,
    )


def _workload(
    tokens: int, width: int, slices: int, max_rank: int, item_size: int, facts: DeviceFacts
) -> Workload:
    return Workload(
        tokens=power_of_two_up(tokens),
        width=width,
        slices=slices,
        max_rank=max_rank,
        item_size=item_size,
        architecture=facts.architecture,
        processors=facts.processors,
    )
