"""Launches that were captured once compute whatever batch the plan holds when they are repeated.

On a GPU they are a CUDA graph. In the interpreter they are what was recorded: the same kernels and
copies with the same grids, numbers and buffers, run again without the code that chose them. In
between, the plan, the ranks, the weights and the activations change in place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from multilora_kernels import (
    PreparedExpand,
    PreparedLinear,
    PreparedShrink,
    lora_expand,
    lora_linear,
    lora_shrink,
    reference,
)
from multilora_kernels.launches.prepared import Prepared
from multilora_kernels.triton import expand

from ..problems import Problem
from .triton_problems import (
    DEVICE,
    as_on_an_h100,
    assert_even,
    even_problem,
    poisoned_memory,
    watched,
)

pytestmark = pytest.mark.slow

SLOTS, MAX_RANK, WIDTHS = 8, 24, (40, 16)

CAPTURED = [0, 1, 2, -1]
BATCHES = {
    "another-order": [1, 0, -1, 2],
    "more-adapters": list(range(SLOTS)),
    "fewer-adapters": [4],
    "base-rows": [-1, 3, -1],
    "few-tokens": None,
    "no-adapter": [-1],
}
"""Slots, repeated until there are as many as tokens; None: three tokens only."""


@dataclass(frozen=True)
class Captured:
    """What is captured.

    Attributes:
        half: The layer, in one call or prepared for many, or a half of it.
        tokens: Rows of the activations.
        k: Columns of x; 1100: cut into parts.
        margin: Columns of y that no slice has; 8 and a k of 48: rows that need not be copied.
        add_inputs: Whether y is added to.
        sum_before: Whether planes are added up by a launch of its own, whatever pays.
        backend: Which kernels.
    """

    half: Literal[
        "linear", "prepared", "shrink", "expand", "prepared-shrink", "prepared-expand"
    ] = "linear"
    tokens: int = 48
    k: int = 40
    margin: int = 3
    add_inputs: bool = True
    sum_before: bool = False
    backend: str = "triton"


CASES = {
    "decode": Captured(),
    "aligned-prepared": Captured("prepared", k=48, margin=8),
    "prepared-shrink": Captured("prepared-shrink", k=1100),
    "prepared-expand": Captured("prepared-expand"),
    "split-k": Captured(k=1100),
    "sum-before": Captured(k=1100, sum_before=True),
    "overwriting": Captured(add_inputs=False),
    "shrink": Captured("shrink", k=1100),
    "expand-overwriting": Captured("expand", add_inputs=False),
    "prefill-prepared": Captured("prepared", tokens=300, k=600, add_inputs=False),
    "prefill-overwriting": Captured(tokens=600, add_inputs=False),
    "prefill-sum-before": Captured(tokens=300, k=600, sum_before=True),
    "invariant": Captured(k=1100, backend="triton-invariant"),
}


@pytest.fixture(autouse=True)
def _watched_and_poisoned() -> Iterator[None]:
    with poisoned_memory(), as_on_an_h100(), watched():
        yield


def fill(slots: list[int] | None, tokens: int) -> list[int]:
    return [2, 5, -1] if slots is None else np.resize(slots, tokens).tolist()


class Layer:
    """One call over tensors that stay where they are, and what they hold at the moment."""

    def __init__(self, case: Captured, token_slots: list[int]) -> None:
        self.case = case
        self.problem = self._problem(token_slots, seed=0)
        self.tokens = len(token_slots)
        self.h = torch.empty(len(WIDTHS), self.tokens, MAX_RANK, device=DEVICE)
        self.out = self.h if case.half.endswith("shrink") else self.problem.y
        self.before = self.out.clone()
        own, layout = self.problem, self.problem.plan.layout
        options = {"backend": case.backend, "add_inputs": case.add_inputs}
        self.prepared: Prepared = PreparedLinear(
            own.lora_a, own.lora_b, own.ranks, layout, **options
        )
        if case.half == "prepared-shrink":
            kept = {"scale": 0.5, "backend": case.backend}
            self.prepared = PreparedShrink(own.lora_a, own.ranks, layout, **kept)
        elif case.half == "prepared-expand":
            self.prepared = PreparedExpand(own.lora_b, own.ranks, layout, **options)

    def _problem(self, token_slots: list[int], seed: int) -> Problem:
        return even_problem(
            token_slots,
            slots=SLOTS,
            k=self.case.k,
            margin=self.case.margin,
            widths=WIDTHS,
            max_rank=MAX_RANK,
            dtype=torch.bfloat16,
            seed=seed,
            tile_rows=128,
        )

    def __call__(self) -> None:
        """What is captured."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(expand, "pays_before_expand", lambda *_: self.case.sum_before)
            self._call()

    def _call(self) -> None:
        own, case = self.problem, self.case
        shared = own.ranks, own.plan
        if case.half == "shrink":
            lora_shrink(self.h, own.x, own.lora_a, *shared, scale=0.5, backend=case.backend)
            return
        options = {"backend": case.backend, "add_inputs": case.add_inputs}
        if case.half == "expand":
            lora_expand(self.out, self.h, own.lora_b, *shared, **options)
        elif case.half.startswith("prepared"):
            given = self.h if case.half == "prepared-expand" else own.x
            self.prepared(self.out, given, own.plan)
        else:
            lora_linear(self.out, own.x, own.lora_a, own.lora_b, *shared, **options)

    def change(self, token_slots: list[int], seed: int) -> None:
        """Another batch, other ranks, weights and activations, in the same memory."""
        padded = token_slots + [-1] * (self.tokens - len(token_slots))
        other, own = self._problem(padded, seed), self.problem
        own.plan.update(np.array(token_slots))
        own.token_slots = token_slots
        for mine, new in zip(
            (own.x, own.y, own.ranks, *own.lora_a, *own.lora_b),
            (other.x, other.y, other.ranks, *other.lora_a, *other.lora_b),
            strict=True,
        ):
            mine.copy_(new)
        if self.out is self.h or not self.case.add_inputs:
            self.out.fill_(float("nan"))
        if self.case.half.endswith("expand"):
            self.h.normal_(generator=torch.Generator(DEVICE).manual_seed(seed))
        self.before = self.out.clone()

    def check(self) -> None:
        """The batch's rows are right, and those that only the captured batch had are untouched."""
        own, case = self.problem, self.case
        tokens, width = len(own.token_slots), sum(WIDTHS)
        shared = own.ranks, own.token_slots
        if self.out is self.h:
            x = own.x.double()[:tokens]
            expected = reference.lora_shrink(x, own.lora_a, *shared, scale=0.5)
            assert_even(self.out[:, :tokens], expected)
            assert torch.isnan(self.out[:, tokens:]).all()
            return
        expected = self.before[:tokens].double()
        options = {"add_inputs": case.add_inputs}
        if case.half.endswith("expand"):
            h = self.h[:, :tokens].double()
            reference.lora_expand(expected, h, own.lora_b, *shared, **options)
        else:
            x = own.x.double()[:tokens]
            reference.lora_linear(expected, x, own.lora_a, own.lora_b, *shared, **options)
        assert_even(self.out[:tokens, :width], expected[:, :width])
        for rest, same in (
            (self.out[tokens:], self.before[tokens:]),
            (self.out[:, width:], self.before[:, width:]),
        ):
            assert rest.view(torch.int16).equal(same.view(torch.int16))


def capture(layer: Layer) -> Callable[[], None]:
    """Captures the call; the result repeats its launches."""
    return _record(layer) if DEVICE == "cpu" else _capture_graph(layer)


def _capture_graph(layer: Layer) -> Callable[[], None]:
    layer()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    return graph.replay


def _record(layer: Layer) -> Callable[[], None]:
    launches, run = [], InterpretedFunction.run

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                launches.append((None, args, {}))
            return func(*args, **(kwargs or {}))

    copies = Copies()

    def record(kernel, *arguments, **named):
        launches.append((kernel, arguments, named))
        with _disable_current_modes():  # what the interpreter itself copies
            return run(kernel, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch, copies:
        patch.setattr(InterpretedFunction, "run", record)
        layer()
    assert any(kernel for kernel, *_ in launches)
    own = {tensor.data_ptr() for tensor in (layer.problem.x, layer.out, layer.h)}
    between = [
        value
        for kernel, arguments, named in launches
        for value in (named.values() if kernel else arguments[:1])
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        if value.untyped_storage().data_ptr() not in own
    ]

    def replay() -> None:
        for tensor in between:
            tensor.fill_(float("nan"))
        for kernel, arguments, named in launches:
            if kernel is None:
                torch.ops.aten.copy_(*arguments)
            else:
                run(kernel, *arguments, **named)

    return replay


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_captured_call_repeats_with_any_batch(case: Captured):
    layer = Layer(case, fill(CAPTURED, case.tokens))
    replay = capture(layer)
    for seed, slots in enumerate(BATCHES.values(), start=1):
        layer.change(fill(slots, case.tokens), seed)
        replay()
        layer.check()
