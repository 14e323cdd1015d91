"""A batch in which nobody has an adapter costs no kernel, and overwrites what it has to."""

import numpy as np
import pytest
import torch

from multilora_kernels import (
    BatchPlan,
    PlanLayout,
    PreparedLinear,
    lora_expand,
    lora_linear,
    lora_shrink,
    torch_backend,
)
from multilora_kernels.native import segment_gemm

from .problems import Problem, make_problem

NOBODY = [-1, -1, -1]
BACKENDS = {"native": segment_gemm, "torch": torch_backend}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """A backend that fails if it is called."""

    def called(*args, **kwargs):
        raise AssertionError("a kernel was called for a batch without adapters")

    for name in ("lora_linear", "lora_shrink", "lora_expand"):
        monkeypatch.setattr(BACKENDS[request.param], name, called)
    monkeypatch.setattr(segment_gemm.Call, "__call__", called)
    return request.param


def weights_of(problem: Problem) -> tuple:
    return problem.lora_a, problem.lora_b, problem.ranks


def test_adding_changes_nothing(backend):
    problem = make_problem(NOBODY, widths=(16, 8))
    y = problem.y.clone()
    lora_linear(y, problem.x, *weights_of(problem), problem.plan, backend=backend)
    PreparedLinear(*weights_of(problem), problem.plan.layout, backend=backend)(
        y, problem.x, problem.plan
    )
    h = torch.ones(2, 3, 16)
    lora_expand(y, h, problem.lora_b, problem.ranks, problem.plan, backend=backend)
    assert y.equal(problem.y)


def test_overwriting_leaves_zeros_for_the_plans_tokens_only(backend):
    problem = make_problem(NOBODY[:2], widths=(16, 8), margin=3)
    x = torch.randn(4, 40)
    expected = torch.full((4, 27), 7.0)
    expected[:2, :24] = 0

    def overwritten(call) -> torch.Tensor:
        y = torch.full((4, 27), 7.0)
        call(y)
        return y

    weights, plan = weights_of(problem), problem.plan
    prepared = PreparedLinear(*weights, plan.layout, add_inputs=False, backend=backend)
    options = {"add_inputs": False, "backend": backend}
    assert overwritten(lambda y: prepared(y, x, plan)).equal(expected)
    assert overwritten(lambda y: lora_linear(y, x, *weights, plan, **options)).equal(expected)
    h = torch.ones(2, 4, 16)
    assert overwritten(lambda y: lora_expand(y, h, *weights[1:], plan, **options)).equal(expected)
    lora_shrink(h, x, problem.lora_a, problem.ranks, plan, backend=backend)
    assert (h[:, :2] == 0).all()
    assert (h[:, 2:] == 1).all()


def test_a_plan_that_was_never_filled_counts_as_one_with_adapters(backend):
    """A graph captured before the first batch must hold the kernels."""
    problem = make_problem(NOBODY)
    plan = BatchPlan(PlanLayout(3, 8))
    with pytest.raises(AssertionError, match="a kernel was called"):
        lora_linear(problem.y, problem.x, *weights_of(problem), plan, backend=backend)
    plan.update(np.array([-1, 2, -1]))
    with pytest.raises(AssertionError, match="a kernel was called"):
        lora_linear(problem.y, problem.x, *weights_of(problem), plan, backend=backend)
