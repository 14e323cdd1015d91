"""Problems for the Triton kernels where they run here: on the GPU, else in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import multilora_kernels
from multilora_kernels import BatchPlan, PlanLayout, lora_linear
from multilora_kernels import triton as backend
from multilora_kernels.trial.result_checks import RELATIVE_RMS, WORST
from multilora_kernels.triton.launch import DeviceFacts
from tools.kernels.measure.counted.interpreter import launched_as_on, observe

from ..problems import Problem, make_problem
from ..tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H100 = DeviceFacts("sm_90", 132, pdl=False)


def problem_here(token_slots: list[int], *, tile_rows: int = 32, tokens: int = 0, **options):
    """A problem on the device of these tests, and a plan for it of a chosen layout."""
    problem = make_problem(token_slots, **options)
    slots = problem.ranks.size(1)
    plan = BatchPlan(PlanLayout(max(tokens, len(token_slots)), slots, tile_rows), DEVICE)
    plan.update(np.array(token_slots))
    return replace(
        problem,
        x=problem.x.to(DEVICE),
        y=problem.y.to(DEVICE),
        lora_a=[a.to(DEVICE) for a in problem.lora_a],
        lora_b=[b.to(DEVICE) for b in problem.lora_b],
        ranks=problem.ranks.to(DEVICE),
        plan=plan,
    )


def even_problem(token_slots: list[int], **options) -> Problem:
    """As `problem_here`, with products about as large as x and y: every error shows."""
    problem = problem_here(token_slots, **options)
    for a, b in zip(problem.lora_a, problem.lora_b, strict=True):
        a *= a.size(-1) ** -0.5
        b *= b.size(-1) ** -0.5
    return problem


def run(problem: Problem, backend: str = "triton", **options) -> torch.Tensor:
    """The result of one call."""
    y = problem.y.clone()
    weights = problem.lora_a, problem.lora_b, problem.ranks
    lora_linear(y, problem.x, *weights, problem.plan, backend=backend, **options)
    return y


def assert_matches(actual: torch.Tensor, problem: Problem, **options) -> None:
    """Within rounding of the sums over absolute values, whatever cancels."""
    assert_close(actual, problem.expected(**options), problem.magnitude(**options))


def assert_even(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within rounding of the result itself, as a whole and in its worst value."""
    assert torch.isfinite(actual).all(), "output has values that are not finite"
    error, size = (actual.double() - expected).abs(), expected.pow(2).mean().sqrt()
    allowed = RELATIVE_RMS[actual.dtype] * size
    assert error.pow(2).mean().sqrt() <= allowed, f"RMS error {error.pow(2).mean().sqrt():.2e}"
    assert error.max() <= WORST * allowed, f"an error of {error.max():.2e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that a kernel gets is full of NaN, so that reading what nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


@contextmanager
def watched() -> Iterator[None]:
    """In the interpreter, no kernel may touch what lies beside its tensors. (It is faster, too.)"""
    with observe(InsideTensors()) if backend.INTERPRETED else nullcontext():
        yield


@contextmanager
def as_on_an_h100() -> Iterator[None]:
    """In the interpreter, blocks and grids are those of an H100; a GPU keeps its own."""
    with launched_as_on(H100) if backend.INTERPRETED else nullcontext():
        yield


class InsideTensors:
    """Stops a kernel of ours before it reads or writes beside the tensors that it was given.

    vLLM's own kernels, which its second model runner launches between ours, are not watched: some
    get addresses as numbers, without the tensors that these belong to.
    """

    def begin_launch(self, kernel: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
        self._kernel = kernel.__name__
        self._is_watched = kernel.__module__.startswith(f"{multilora_kernels.__name__}.")
        self._extents = []
        for tensor in tensors:
            pairs = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in pairs)
            start = tensor.data_ptr()
            self._extents.append((start, start + (last + 1) * tensor.element_size()))

    def begin_program(self) -> None:
        pass

    def access(self, addresses: np.ndarray, item_size: int, store: bool) -> None:
        if self._is_watched and len(addresses):
            first, end = int(addresses.min()), int(addresses.max()) + item_size
            inside = any(start <= first and end <= stop for start, stop in self._extents)
            verb = "writes" if store else "reads"
            assert inside, f"{self._kernel} {verb} beside its tensors"

    def end_launch(self) -> None:
        pass
