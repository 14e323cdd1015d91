"""Wherever activations begin, results have the bits of those that need not be copied."""

from collections.abc import Callable

import pytest
import torch

from multilora_kernels import (
    PreparedExpand,
    PreparedLinear,
    PreparedShrink,
    lora_expand,
    lora_linear,
    lora_shrink,
)

from ..problems import Problem
from .triton_problems import even_problem, poisoned_memory, watched

pytestmark = pytest.mark.slow

WIDTHS, RANK = (40, 13), 24
PLACES = {
    "late": (1, 0),
    "odd-rows": (0, 1),
    "rows-of-8-more": (0, 8),
}
"""Elements before the first row, and after each."""


def linear(problem: Problem, y: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    lora_linear(
        y, x, problem.lora_a, problem.lora_b, problem.ranks, problem.plan, offset=16,
        backend="triton",
    )  # fmt: skip


def prepared(problem: Problem, y: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    weights = problem.lora_a, problem.lora_b, problem.ranks
    PreparedLinear(*weights, problem.plan.layout, backend="triton")(y, x, problem.plan)


def overwriting(problem: Problem, y: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    weights = problem.lora_a, problem.lora_b, problem.ranks
    options = {"add_inputs": False, "backend": "triton"}
    PreparedLinear(*weights, problem.plan.layout, **options)(y, x, problem.plan)


def shrink(problem: Problem, y: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    lora_shrink(h, x, problem.lora_a, problem.ranks, problem.plan, backend="triton")


def prepared_shrink(problem: Problem, y: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    layout = problem.plan.layout
    PreparedShrink(problem.lora_a, problem.ranks, layout, backend="triton")(h, x, problem.plan)


def expand(problem: Problem, y: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    lora_expand(y, h, problem.lora_b, problem.ranks, problem.plan, offset=3, backend="triton")


def prepared_expand(problem: Problem, y: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> None:
    options = {"offset": 3, "backend": "triton"}
    call = PreparedExpand(problem.lora_b, problem.ranks, problem.plan.layout, **options)
    call(y, h, problem.plan)


CALLS = (linear, prepared, overwriting, shrink, prepared_shrink, expand, prepared_expand)
SAME = {prepared_shrink: shrink, prepared_expand: expand}


def placed(values: torch.Tensor, late: int, extra: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in rows of some memory, and a view of that memory as integers."""
    rows, width = values[..., 0].numel(), values.size(-1)
    memory = torch.full((late + rows * (width + extra),), 7.0).to(values)
    inside = memory[late:].view(*values.shape[:-1], width + extra)[..., :width]
    return inside.copy_(values), memory


def results(
    call: Callable[..., None], tokens: int, late: int, extra: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and h after a call; what lies between their rows is as it was."""
    problem = even_problem(
        [0, 3, -1, 3, 5][:tokens], widths=WIDTHS, max_rank=RANK, k=48, margin=27,
        dtype=torch.bfloat16,
    )  # fmt: skip
    h = torch.randn(len(WIDTHS), tokens, RANK, generator=torch.Generator().manual_seed(1)).to(
        problem.x.device
    )
    found = []
    (y, y_memory), (x, _), (h, h_memory) = (
        placed(values, late, extra) for values in (problem.y, problem.x, h)
    )
    with poisoned_memory(), watched():
        call(problem, y, x, h)
    for values, memory in ((y, y_memory), (h, h_memory)):
        found.append(values.clone())
        values.fill_(7.0)
        assert (memory == 7.0).all(), "something was written beside the rows"
    return found[0], found[1]


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_wherever_rows_begin_the_bits_are_the_same(call, place):
    for tokens in (5, 1):
        expected = results(SAME.get(call, call), tokens, 0, 0)
        for mine, other in zip(results(call, tokens, *place), expected, strict=True):
            assert torch.isfinite(mine).all()
            assert mine.equal(other)
