"""A prepared native call describes a batch anew only if more than its values differ."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from multilora_kernels import BatchPlan, OutputFactors, PlanLayout, PreparedLinear, lora_linear
from multilora_kernels.native import segment_gemm

from ..problems import Problem, make_problem

SLOTS, K, WIDTHS = 4, 40, (24, 16)
LAYOUT = PlanLayout(64, SLOTS)


def problem_of(token_slots: list[int], **options) -> Problem:
    """A problem with the same weights for every batch."""
    found = make_problem(token_slots, slots=SLOTS, k=K, widths=WIDTHS, margin=0, **options)
    one = make_problem([0], slots=SLOTS, k=K, widths=WIDTHS)
    found.lora_a, found.lora_b, found.ranks = one.lora_a, one.lora_b, one.ranks
    found.plan = BatchPlan(LAYOUT)
    found.plan.update(np.array(token_slots))
    return found


def prepared_of(problem: Problem, **options) -> PreparedLinear:
    weights = problem.lora_a, problem.lora_b, problem.ranks
    return PreparedLinear(*weights, LAYOUT, **options)  # on CPUs these are native calls


def assert_right(prepared: PreparedLinear, problem: Problem) -> None:
    y, expected = problem.y.clone(), problem.y.clone()
    weights = problem.lora_a, problem.lora_b, problem.ranks
    lora_linear(expected, problem.x, *weights, problem.plan, backend="native")
    prepared(y, problem.x, problem.plan)
    assert y.equal(expected)


@pytest.fixture
def described(monkeypatch) -> list[int]:
    """Has an entry for each batch that was described."""
    seen = []
    call = segment_gemm.Call.__call__

    def describe(self, *args, **kwargs):
        seen.append(1)
        call(self, *args, **kwargs)

    monkeypatch.setattr(segment_gemm.Call, "__call__", describe)
    return seen


def test_other_values_in_the_same_batch_are_not_described_again(described):
    first, second = (problem_of([0, 3, -1, 0, 1], seed=seed) for seed in (1, 2))
    prepared = prepared_of(first)
    prepared(first.y.clone(), first.x, first.plan)
    described.clear()
    second.plan = first.plan
    second.plan.update(np.array([2, 2, 0, -1, 3]))
    y = second.y.clone()
    prepared(y, second.x, second.plan)
    assert not described
    assert_right(prepared, second)


@pytest.mark.parametrize("add_inputs", [True, False])
def test_nor_is_a_batch_without_adapters_after_one_with_them(add_inputs, described):
    problem = problem_of([0, 3, -1, 0, 1])
    prepared = prepared_of(problem, add_inputs=add_inputs)
    prepared(problem.y.clone(), problem.x, problem.plan)
    described.clear()
    problem.plan.update(np.array([-1] * 5))
    y = problem.y.clone()
    prepared(y, problem.x, problem.plan)
    assert not described
    assert y.equal(problem.y if add_inputs else torch.zeros_like(y))


@pytest.mark.parametrize("change", ["tokens", "x", "y", "x's rows", "y's rows", "plan", "threads"])
def test_whatever_else_differs_is(change, described, monkeypatch):
    before = problem_of([0, 3, -1, 0, 1])
    prepared = prepared_of(before)
    prepared(before.y.clone(), before.x, before.plan)
    after = problem_of([1, 2, 3] if change == "tokens" else [0, 1, 2, 3, -1], seed=3)
    if change != "plan":
        after.plan = before.plan
        after.plan.update(np.array(after.token_slots))
    if change == "x":
        after.x = after.x.bfloat16()
    elif change == "y":
        after.y = after.y.bfloat16()
    elif change == "x's rows":
        after.x = after.x.repeat(1, 2)[:, :K]
    elif change == "threads":
        more = torch.get_num_threads() + 1
        monkeypatch.setattr(torch, "get_num_threads", lambda: more)
    described.clear()
    y = after.y.clone()
    prepared(y.repeat(1, 2)[:, : y.size(1)] if change == "y's rows" else y, after.x, after.plan)
    assert described
    assert_right(prepared, after)
    before.plan.update(np.array(before.token_slots))
    assert_right(prepared, before)


def test_what_does_not_fit_is_refused_after_what_did():
    problem = problem_of([0, 3, 1])
    prepared = prepared_of(problem)
    assert_right(prepared, problem)
    with pytest.raises(ValueError, match="expected x of shape"):
        prepared(problem.y.clone(), problem.x[:2], problem.plan)
    with pytest.raises(ValueError, match=r"y of shape .tokens, >= 40."):
        prepared(problem.y[:, :39], problem.x, problem.plan)
    with pytest.raises(ValueError, match="x must be 2-D with contiguous rows"):
        prepared(problem.y.clone(), problem.x.T.contiguous().T, problem.plan)
    assert_right(prepared, problem)


def test_a_call_made_on_one_thread_runs_on_another():
    problem = problem_of([0, 3, 1])
    prepared = prepared_of(problem)
    assert_right(prepared, problem)
    scratch = prepared._run._scratch
    with ThreadPoolExecutor(1) as other:
        other.submit(assert_right, prepared, problem).result(60)
    assert prepared._run._scratch is not scratch  # other layers use it on their own thread
    assert_right(prepared, problem)


def test_a_prepared_layer_keeps_its_tensors():
    problem = problem_of([0, 3, 1])
    factors = OutputFactors(torch.zeros(SLOTS, 40), torch.zeros(2, SLOTS, dtype=torch.int32))
    tensors = *problem.lora_a, *problem.lora_b, problem.ranks, factors.values, factors.marks
    kept = [weakref.ref(tensor) for tensor in tensors]
    prepared = prepared_of(problem, factors=factors)
    del problem, factors, tensors
    gc.collect()
    assert all(each() is not None for each in kept)
    del prepared


def test_another_layer_may_need_more_scratch_memory_in_between():
    small, large = problem_of([0, 3, 1]), make_problem([0] * 600, k=5000, widths=(8,), slots=1)
    prepared = prepared_of(small)
    assert_right(prepared, small)
    weights = large.lora_a, large.lora_b, large.ranks
    lora_linear(large.y.clone(), large.x, *weights, large.plan, backend="native")
    assert_right(prepared, small)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_scratch_memory_is_host_memory_of_floats_whatever_the_defaults_are(dtype, monkeypatch):
    """Here none is written: it would be past the end of what is too short."""
    problem, needed = problem_of([0, 3, 1]), segment_gemm._library().multilora_scratch_floats
    monkeypatch.setattr(segment_gemm, "_scratch", segment_gemm._Scratch())
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            prepared = prepared_of(problem)
            call = prepared._run
            monkeypatch.setattr(call, "_compute", lambda address: None)
            for threads in (1, 3):
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                prepared(problem.y, problem.x, problem.plan)
                assert call._scratch.device.type == "cpu"
                assert call._scratch.nbytes == 4 * needed(call._address, threads)
    finally:
        torch.set_default_dtype(usual)


def test_without_memory_nothing_is_computed(monkeypatch):
    problem = problem_of([0, 3, 1])
    prepared, y = prepared_of(problem), problem.y.clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1 << 40)  # each has scratch memory
        with pytest.raises(RuntimeError, match="allocate"):
            prepared(y, problem.x, problem.plan)
    assert y.equal(problem.y)
    assert_right(prepared, problem)
