"""What a captured graph holds: every kernel, unless batches without adapters have other graphs."""

import numpy as np
import pytest
import torch

from multilora_kernels import (
    BatchPlan,
    PreparedLinear,
    lora_expand,
    lora_linear,
    lora_shrink,
    skipping,
    torch_backend,
)

from ..problems import Problem, make_problem

NOBODY, SOMEBODY = [-1, -1, -1], [-1, 2, -1]


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The backend's functions that were called."""
    calls: list[str] = []
    for name in ("lora_linear", "lora_shrink", "lora_expand"):
        monkeypatch.setattr(torch_backend, name, lambda *_, name=name: calls.append(name))
    return calls


@pytest.fixture(params=[True, False], ids=["overwrite", "add"])
def call_all(request):
    """Calls everything that launches kernels for a problem; returns what y became."""

    def call(problem: Problem) -> torch.Tensor:
        options = {"add_inputs": not request.param, "backend": "torch"}
        weights = problem.lora_a, problem.lora_b, problem.ranks
        y = problem.y.clone()
        lora_linear(y, problem.x, *weights, problem.plan, **options)
        PreparedLinear(*weights, problem.plan.layout, **options)(y, problem.x, problem.plan)
        h = torch.empty(1, len(problem.x), 16)
        lora_shrink(h, problem.x, problem.lora_a, problem.ranks, problem.plan, backend="torch")
        lora_expand(y, h, problem.lora_b, problem.ranks, problem.plan, **options)
        return y

    return call


ALL = ["lora_linear", "lora_linear", "lora_shrink", "lora_expand"]


@pytest.mark.parametrize("token_slots", [NOBODY, SOMEBODY], ids=["nobody", "somebody"])
def test_a_graph_holds_the_kernels_whatever_batch_it_is_captured_with(
    monkeypatch, launched, call_all, token_slots
):
    monkeypatch.setattr(skipping, "is_capturing", lambda device: True)
    problem = make_problem(token_slots)
    assert call_all(problem).equal(problem.y), "kernels write, nothing else does"
    assert launched == ALL


@pytest.mark.parametrize(
    ("token_slots", "expected"), [(NOBODY, []), (SOMEBODY, ALL)], ids=["nobody", "somebody"]
)
def test_graphs_of_their_own_hold_none_for_batches_without_adapters(
    monkeypatch, launched, call_all, token_slots, expected
):
    monkeypatch.setattr(skipping, "is_capturing", lambda device: True)
    problem = make_problem(token_slots)
    problem.plan.update(np.array(token_slots), own_graphs=True)
    call_all(problem)
    assert launched == expected


def test_what_a_plan_was_given_holds_for_one_batch(monkeypatch, launched, call_all):
    monkeypatch.setattr(skipping, "is_capturing", lambda device: True)
    problem = make_problem(NOBODY)
    problem.plan.update(np.array(NOBODY), own_graphs=True)
    assert problem.plan.own_graphs
    problem.plan.update(np.array(NOBODY))
    assert not problem.plan.own_graphs
    call_all(problem)
    assert launched == ALL


def test_the_header_says_on_the_host_and_on_the_device_what_the_plan_was_given():
    plan = BatchPlan.build(SOMEBODY, 8)
    plan.update(np.array(NOBODY), own_graphs=True)
    assert plan.buffer[:5].tolist() == plan.host[:5].tolist() == [3, 0, 0, 0, 1]


@pytest.mark.parametrize("capturing", [False, True])
def test_the_driver_is_asked_about_the_current_stream_on_gpus_only(monkeypatch, capturing):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert skipping.is_capturing(torch.device("cuda", 0)) is capturing

    def never() -> bool:
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", never)
    assert skipping.is_capturing(torch.device("cpu")) is False


def test_the_driver_is_not_asked_where_the_batch_decides(monkeypatch, launched, call_all):
    """Every layer of every step comes here."""

    def never(device: torch.device) -> bool:
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(skipping, "is_capturing", never)
    call_all(make_problem(SOMEBODY))
    assert launched == ALL
