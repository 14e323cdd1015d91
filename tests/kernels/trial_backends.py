"""Kernels for trials: right ones, and such as fail in every way that a card's may."""

import os
import time
from collections.abc import Callable

import torch

from multilora_kernels import BatchPlan
from multilora_kernels.trial.kinds import LayerKind
from multilora_kernels.trial.trial_backends import torch_products as right
from multilora_kernels.trial.trial_backends import triton

__all__ = ["right", "triton"]

BAD_INPUTS = 48
"""Layers with so many inputs are computed wrongly; others are not."""


def when_bad(misbehave: Callable[[torch.Tensor, BatchPlan], None]) -> Callable:
    """Right kernels that do something besides in one kind of layer."""

    def prepare(kind: LayerKind, weights, layout):
        call = right(kind, weights, layout)
        if kind.inputs != BAD_INPUTS:
            return call

        def bad(out: torch.Tensor, given: torch.Tensor, plan: BatchPlan) -> None:
            call(out, given, plan)
            misbehave(out, plan)

        return bad

    return prepare


def spoil_last_row(out: torch.Tensor, plan: BatchPlan) -> None:
    if plan.tokens > 1:
        out[..., -1, -1] += 5


def raise_an_error(out: torch.Tensor, plan: BatchPlan) -> None:
    raise RuntimeError("out of resource: shared memory\nRequired: 262144")


def hang(out: torch.Tensor, plan: BatchPlan) -> None:
    time.sleep(600)


def fault(out: torch.Tensor, plan: BatchPlan) -> None:
    os.abort()


def run_out_of_memory(out: torch.Tensor, plan: BatchPlan) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


out_of_memory = when_bad(run_out_of_memory)
wrong, raising = when_bad(spoil_last_row), when_bad(raise_an_error)
hanging, faulting = when_bad(hang), when_bad(fault)


def raising_always(kind: LayerKind, weights, layout):
    """Raises in every kind of layer."""
    return lambda out, given, plan: raise_an_error(out, plan)


def reading_rests(kind: LayerKind, weights, layout):
    """Multiplies by all ranks, whatever the true ones are."""
    full = torch.full_like(weights.ranks, kind.max_rank)
    return right(kind, type(weights)(weights.a, weights.b, full), layout)
