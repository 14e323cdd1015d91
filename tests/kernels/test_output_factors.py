"""Factors of a layer's outputs (DoRA): on base and product together, without the base's bias."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from multilora_kernels import (
    BatchPlan,
    OutputFactors,
    PreparedLinear,
    column_major,
    lora_linear,
)

from .problems import Problem, make_problem
from .tolerances import assert_close
from .triton.triton_problems import DEVICE, as_on_an_h100, poisoned_memory, problem_here, watched

MIXED = [i % 6 - 1 for i in range(45)]
BATCHES = {
    "decode": ([3, 0, 7, 1, -1, 2, 5, 4], (5, 70, 33, 1, 9)),
    "one-row": ([1], (24,)),
    "mixed": (MIXED, (5, 70, 33, 1, 9)),
    "long-runs": ([1] * 70 + [-1] * 3 + [2] * 40 + [3], (80, 16, 16)),
}
BACKENDS = ["torch", "triton"] + ["native"] * (DEVICE == "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _watched_and_poisoned() -> Iterator[None]:
    with poisoned_memory(), watched():
        yield


def factors_for(problem: Problem, *, bias: bool = True, seed: int = 9) -> OutputFactors:
    """Every other mark is set; values of columns that no mark is set for are NaN."""
    generator = torch.Generator().manual_seed(seed)
    slices, slots = problem.ranks.shape
    widths = [b.size(-2) for b in problem.lora_b]
    marks = torch.tensor([[(i + s) % 2 for s in range(slots)] for i in range(slices)])
    values = torch.randn(slots, sum(widths), generator=generator)
    first = 0
    for i, width in enumerate(widths):
        for slot in range(slots):
            if not marks[i, slot]:
                values[slot, first : first + width] = float("nan")
        first += width
    own = torch.randn(sum(widths), generator=generator) if bias else None
    device = problem.x.device
    return OutputFactors(
        values.to(device), marks.int().to(device), None if own is None else own.to(device)
    )


def run(problem: Problem, backend: str, factors: OutputFactors | None, **options) -> torch.Tensor:
    y = problem.y.clone()
    weights = problem.lora_a, problem.lora_b, problem.ranks
    lora_linear(y, problem.x, *weights, problem.plan, factors=factors, backend=backend, **options)
    return y


def assert_matches(actual: torch.Tensor, problem: Problem, factors: OutputFactors, **options):
    sums = problem.magnitude(**options)
    grown = 1 + torch.nan_to_num(factors.values).abs().max()
    bias = 0 if factors.bias is None else factors.bias.abs().max()
    assert_close(actual, problem.expected(factors=factors, **options), (sums + bias) * grown)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("token_slots", "widths"), BATCHES.values(), ids=BATCHES.keys())
def test_base_and_product_are_multiplied(token_slots, widths, bias, backend):
    problem = problem_here(token_slots, widths=widths)
    factors = factors_for(problem, bias=bias)
    assert_matches(run(problem, backend, factors, offset=2), problem, factors, offset=2)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_column", [False, True], ids=["b-by-row", "b-by-column"])
def test_every_pair_of_dtypes(dtype, weight_dtype, by_column, backend):
    problem = make_problem(MIXED, widths=(70, 9), dtype=dtype, weight_dtype=weight_dtype)
    if by_column:
        problem = replace(problem, lora_b=[column_major(b).copy_(b) for b in problem.lora_b])
    factors = factors_for(problem)
    assert_matches(run(problem, backend, factors), problem, factors)


@pytest.mark.parametrize(
    ("dtype", "max_rank"), [(torch.bfloat16, 200), (torch.float16, 16), (torch.float32, 200)]
)
def test_triton_multiplies_in_any_dtype_and_beyond_a_block_of_ranks(dtype, max_rank):
    problem = problem_here(MIXED, widths=(70, 9), max_rank=max_rank, dtype=dtype)
    factors = factors_for(problem)
    with as_on_an_h100():
        assert_matches(run(problem, "triton", factors), problem, factors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_others_keep_their_bits(backend):
    problem = problem_here(MIXED, widths=(80, 16), dtype=torch.bfloat16)
    factors = factors_for(problem)
    plain, mixed = run(problem, backend, None), run(problem, backend, factors)
    first = 0
    for i, width in enumerate((80, 16)):
        span = slice(first, first + width)
        for t, slot in enumerate(MIXED):
            if slot < 0 or not factors.marks[i, slot]:
                assert torch.equal(mixed[t, span], plain[t, span])
        first += width
    unmarked = replace(factors, marks=torch.zeros_like(factors.marks))
    assert torch.equal(run(problem, backend, unmarked), plain)


def test_a_row_has_the_same_bits_alone():
    problem = make_problem([1] * 70 + [-1] * 3 + [2] * 40 + [3], widths=(80, 16))
    factors = factors_for(problem)
    whole = run(problem, "native", factors)
    for t in (0, 69, 75, 113):
        slot = problem.token_slots[t]
        alone = replace(
            problem,
            token_slots=[slot],
            x=problem.x[t : t + 1],
            y=problem.y[t : t + 1],
            plan=BatchPlan.build(np.array([slot]), 8),
        )
        assert torch.equal(run(alone, "native", factors)[0], whole[t])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prepared_layer_follows_factors_and_marks(backend):
    problem = problem_here([3, 0, 7, 1, -1, 2, 5, 4], widths=(24, 40))
    factors = factors_for(problem)
    layer = PreparedLinear(
        problem.lora_a,
        problem.lora_b,
        problem.ranks,
        problem.plan.layout,
        factors=factors,
        backend=backend,
    )
    for _ in range(2):
        y = problem.y.clone()
        layer(y, problem.x, problem.plan)
        assert_matches(y, problem, factors)
        factors.values.nan_to_num_(0.25).mul_(2)
        factors.marks.copy_(1 - factors.marks)


def test_compiled_code_takes_them():
    problem = make_problem(MIXED, widths=(24, 40))
    factors = factors_for(problem)
    call = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(call(problem, "native", factors), run(problem, "native", factors))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": torch.zeros(8, 23)}, r"factors.values must be .*\[8, 24\]"),
        ({"values": torch.zeros(8, 24).double()}, "factors.values must be torch.float32"),
        ({"marks": torch.zeros(1, 7, dtype=torch.int32)}, r"factors.marks must be .*\[1, 8\]"),
        ({"values": torch.zeros(8, 48)[:, ::2]}, "factors.values must .* with contiguous rows"),
        ({"bias": torch.zeros(2, 24)[0, ::2]}, r"factors.bias must be .*\[24\]"),
    ],
    ids=["values", "dtype", "marks", "strides", "bias"],
)
def test_what_does_not_fit_is_refused(change, words):
    problem = make_problem(MIXED)
    factors = replace(factors_for(problem), **change)
    with pytest.raises(ValueError, match=words):
        run(problem, "native", factors)
    weights = problem.lora_a, problem.lora_b, problem.ranks
    with pytest.raises(ValueError, match=words):
        PreparedLinear(*weights, problem.plan.layout, factors=factors)


def test_factors_of_overwritten_columns_are_refused():
    problem = make_problem(MIXED)
    with pytest.raises(ValueError, match="add_inputs=True"):
        run(problem, "native", factors_for(problem), add_inputs=False)
