"""The Triton backend, for CUDA and ROCm devices and, in Triton's interpreter, for CPU tensors.

`shrink`, `expand` and `combine` hold one kernel each beside its launcher, `product` puts them
together, `prepared_launches` keeps them for a layer; `README.md` explains them. Nothing here reads
device memory on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from triton.runtime.interpreter import InterpretedFunction

from multilora_kernels.factors import OutputFactors
from multilora_kernels.plan import PlanLayout
from multilora_kernels.triton.activations import aligned, aligned_h, aligned_output
from multilora_kernels.triton.combine import prepare_combine
from multilora_kernels.triton.expand import expand_kernel
from multilora_kernels.triton.launch import Batch, device_facts
from multilora_kernels.triton.prepared_launches import (
    PreparedExpandLaunches,
    PreparedLaunches,
    PreparedShrinkLaunches,
)
from multilora_kernels.triton.product import expand_launch, shrink_launch
from multilora_kernels.triton.shrink import kept_type

INTERPRETED = isinstance(expand_kernel, InterpretedFunction)
"""Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 when this was imported."""

__all__ = [
    "INTERPRETED",
    "lora_expand",
    "lora_linear",
    "lora_shrink",
    "prepare_expand",
    "prepare_linear",
    "prepare_shrink",
]


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    scale: float,
    offset: int,
    add_inputs: bool,
    factors: OutputFactors | None = None,
    batch_invariant: bool = False,
) -> None:
    """See `multilora_kernels.lora_linear`; arguments are valid."""
    if not x.size(0):
        return
    batch = Batch(ranks, plan, layout, device_facts(x.device), batch_invariant)
    with aligned_output(y, offset) as (own, first):
        planes, shrink = shrink_launch(aligned(x), lora_a, batch, scale, kept_type(y, lora_b))
        # All memory is there before the first launch: nothing comes between the two.
        expand = expand_launch(
            own, planes, lora_b, batch, first, add_inputs, after_shrink=True, factors=factors
        )
        shrink.run()
        expand.run()


def prepare_linear(
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
    scale: float,
    add_inputs: bool,
    factors: OutputFactors | None = None,
    batch_invariant: bool = False,
) -> Callable[..., None]:
    """What runs a batch of `multilora_kernels.PreparedLinear`; arguments are valid."""
    facts = device_facts(ranks.device)
    return PreparedLaunches(
        lora_a, lora_b, ranks, layout, scale, add_inputs, facts, batch_invariant, factors
    ).run


def lora_shrink(
    h: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    scale: float,
    batch_invariant: bool = False,
) -> None:
    """See `multilora_kernels.lora_shrink`; arguments are valid."""
    if not x.size(0):
        return
    batch = Batch(ranks, plan, layout, device_facts(x.device), batch_invariant)
    own = aligned_h(h)
    planes, launch = shrink_launch(aligned(x), lora_a, batch, scale, h.dtype)
    launch.run()
    prepare_combine(own, planes, batch).run()
    if own is not h:
        h.copy_(own)


def lora_expand(
    y: torch.Tensor,
    h: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    offset: int,
    add_inputs: bool,
    batch_invariant: bool = False,
) -> None:
    """See `multilora_kernels.lora_expand`; arguments are valid. Copies h if not contiguous."""
    if not y.size(0):
        return
    batch = Batch(ranks, plan, layout, device_facts(y.device), batch_invariant)
    planes = aligned_h(h).unsqueeze(0)
    with aligned_output(y, offset) as (own, first):
        expand_launch(own, planes, lora_b, batch, first, add_inputs, after_shrink=False).run()


def prepare_shrink(
    lora_a: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
    scale: float,
    batch_invariant: bool = False,
) -> Callable[..., None]:
    """What runs a batch of `multilora_kernels.PreparedShrink`; arguments are valid."""
    facts = device_facts(ranks.device)
    return PreparedShrinkLaunches(
        lora_a, ranks, layout, scale, facts, batch_invariant=batch_invariant
    ).run


def prepare_expand(
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
    offset: int,
    add_inputs: bool,
    batch_invariant: bool = False,
) -> Callable[..., None]:
    """What runs a batch of `multilora_kernels.PreparedExpand`; arguments are valid."""
    facts = device_facts(ranks.device)
    return PreparedExpandLaunches(
        lora_b, ranks, layout, offset, add_inputs, facts, batch_invariant=batch_invariant
    ).run
