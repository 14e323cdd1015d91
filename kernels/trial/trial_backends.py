"""This package's kernels as a trial calls them, each by a function that can be named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from multilora_kernels.launches.prepared import PreparedExpand, PreparedLinear, PreparedShrink
from multilora_kernels.plan import BatchPlan, PlanLayout
from multilora_kernels.trial.kinds import LayerKind
from multilora_kernels.trial.trial_problems import Weights

Call = Callable[[torch.Tensor, torch.Tensor, BatchPlan], None]
"""Computes a batch: what is written, what is given, the plan."""
Prepare = Callable[[LayerKind, Weights, PlanLayout], Call]
"""Makes the call of a kind of layer."""


def _prepare(backend: str, kind: LayerKind, weights: Weights, layout: PlanLayout) -> Call:
    a, b, ranks = weights.a, weights.b, weights.ranks
    if kind.operation == "shrink":
        return PreparedShrink(a, ranks, layout, backend=backend)
    if kind.operation == "expand":
        return PreparedExpand(
            b, ranks, layout, offset=kind.offset, add_inputs=kind.add_inputs, backend=backend
        )
    return PreparedLinear(a, b, ranks, layout, add_inputs=kind.add_inputs, backend=backend)


triton: Prepare = partial(_prepare, "triton")
invariant: Prepare = partial(_prepare, "triton-invariant")
torch_products: Prepare = partial(_prepare, "torch")
