"""The same bits every time: in any order of programs, alone or in a batch, summed early or late."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from multilora_kernels import lora_shrink
from multilora_kernels import triton as backend
from multilora_kernels.triton import expand
from multilora_kernels.triton.launch import Batch

from .triton_problems import (
    DEVICE,
    as_on_an_h100,
    assert_even,
    assert_matches,
    even_problem,
    poisoned_memory,
    problem_here,
    run,
    watched,
)

interpreted = pytest.mark.skipif(
    not backend.INTERPRETED, reason="here the card orders the programs, not the interpreter"
)


@pytest.fixture(autouse=True)
def _watched_and_poisoned() -> Iterator[None]:
    with poisoned_memory(), watched():
        yield


ORDERS: dict[str, Callable[[int], np.ndarray]] = {
    "reversed": lambda count: np.arange(count)[::-1],
    "random": lambda count: np.random.default_rng(0).permutation(count),
}


@contextmanager
def programs_in_order(order: Callable[[int], np.ndarray]) -> Iterator[None]:
    """Every launch's programs meanwhile run one by one in this order of theirs."""
    builder, order = interpreter.interpreter_builder, lru_cache(order)
    start = builder.set_grid_idx

    def start_another(x: int, y: int, z: int) -> None:
        width, height, depth = builder.grid_dim
        there = int(order(width * height * depth)[(x * height + y) * depth + z])
        start(there // depth // height, there // depth % height, there % depth)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", start_another)
        yield


BATCHES = {
    "decode": {"tokens": 9, "k": 1100},
    "overwriting": {"tokens": 9, "k": 1100, "add_inputs": False},
    "sum-before": {"tokens": 9, "k": 1100, "sum_before": True},
    "prefill": {"tokens": 300, "k": 100},
    "prefill-split-k": {"tokens": 300, "k": 600, "sum_before": True},
    "invariant": {"tokens": 9, "k": 2100, "backend": "triton-invariant"},
}


@interpreted
@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(batch, id=name, marks=[] if name == "decode" else pytest.mark.slow)
        for name, batch in BATCHES.items()
    ],
)
def test_programs_of_any_order_give_the_same_bits(monkeypatch, batch):
    """Nothing is added to the same place by two programs, and none reads what another writes."""
    options = dict(batch)
    tokens, k = options.pop("tokens"), options.pop("k")
    before = options.pop("sum_before", False)
    monkeypatch.setattr(expand, "pays_before_expand", lambda *_: before)
    problem = even_problem(
        [i % 5 - 1 for i in range(tokens)],
        slots=4,
        k=k,
        widths=(48, 24),
        max_rank=40,
        ranks=[[40, 13, 1, 17], [5, 0, 33, 40]],
        dtype=torch.bfloat16,
        tile_rows=128,
    )
    if k > 1000:  # rounding to 16 bits would hide a difference
        problem.y = problem.y.float()
    with as_on_an_h100():
        in_turn = run(problem, **options)
        assert_even(in_turn, problem.expected(add_inputs=options.get("add_inputs", True)))
        for order in ORDERS.values():
            with programs_in_order(order):
                assert run(problem, **options).equal(in_turn)


@interpreted
def test_the_first_half_alone_in_any_order():
    problem = even_problem([0, 2, -1, 1, 2], slots=3, k=1100, widths=(8, 8), dtype=torch.float16)
    results = []
    for order in (np.arange, *ORDERS.values()):
        h = torch.empty(2, 5, 16, device=DEVICE)
        with programs_in_order(order):
            lora_shrink(h, problem.x, problem.lora_a, problem.ranks, problem.plan, backend="triton")
        results.append(h)
    assert all(torch.isfinite(h).all() and h.equal(results[0]) for h in results)


LOW, HIGH = [[13, 24, 3], [0, 9, 24]], [[136, 70, 3], [0, 133, 64]]
TYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16, HIGH),
    "float32": (torch.float32, torch.float32, LOW),
    "bfloat16-weights": (torch.float32, torch.bfloat16, LOW),
}


@pytest.mark.parametrize(("dtype", "weight_dtype", "ranks"), TYPES.values(), ids=TYPES.keys())
def test_a_sum_beforehand_has_the_same_bits(monkeypatch, dtype, weight_dtype, ranks):
    """An adapter's rank neither ends a block nor a load, and some tokens have no adapter."""
    max_rank = max(map(max, ranks))
    options = {"widths": (40, 24), "k": 1100, "max_rank": max_rank, "slots": 3, "ranks": ranks}
    problem = problem_here(
        [0, 1, -1, 2] * 9, dtype=dtype, weight_dtype=weight_dtype, tile_rows=16, **options
    )
    results = []
    for before in (False, True):
        monkeypatch.setattr(expand, "pays_before_expand", lambda *_, answer=before: answer)
        results.append(run(problem))
        assert_matches(results[-1], problem)
    assert results[0].equal(results[1])


@interpreted
@pytest.mark.parametrize("add_inputs", [True, False], ids=["added", "overwritten"])
@pytest.mark.parametrize(
    "width",
    [
        pytest.param(blocks * 64 - short, id=f"{blocks}-blocks-{short}-short")
        for blocks, short in ((1, 24), (2, 0), (3, 8), (4, 0), (5, 56))
    ],
)
def test_passes_of_two_steps_have_the_bits_of_single_steps(monkeypatch, width, add_inputs):
    """Cards since sm_90 have them. What runs for 64 ranks and for fewer are loops of their own."""
    monkeypatch.setattr(Batch, "programs", lambda *_: 1)
    options = {"widths": (width,), "max_rank": 64, "slots": 3, "ranks": [[64, 20, 8]]}
    problem = problem_here([0, 1, -1, 2, 2], k=64, dtype=torch.bfloat16, **options)
    results = []
    for answer in (1, 2):
        steps = Mock(return_value=answer)
        monkeypatch.setattr(expand, "_steps_in_a_pass", steps)
        results.append(run(problem, add_inputs=add_inputs))
        assert_matches(results[-1], problem, add_inputs=add_inputs)
        assert steps.called
    assert results[0].equal(results[1])


@pytest.fixture
def _dot_by_columns(monkeypatch):
    """Products summed as a GPU does, the same way in every row of a block.

    The interpreter multiplies with BLAS, where a row's bits depend on its place in the block.
    """

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for column in range(a.data.shape[1]):
            total += a.data[:, column, None] * b.data[None, column]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.slow
@pytest.mark.usefixtures("_dot_by_columns")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_invariant_results_do_not_depend_on_the_batch(dtype):
    """A row alone, and in batches of any size and order, gets the same bits."""
    token_slots = [i * 7 % 5 - 1 for i in range(150)]
    options = {"widths": (48, 16), "k": 2100, "max_rank": 40, "dtype": dtype, "tokens": 256}
    options |= {"slots": 4, "tile_rows": 64}
    problem = problem_here(token_slots, **options)
    problem.y = problem.y.float()  # rounding to 16 bits would hide a difference
    whole = run(problem, "triton-invariant")
    assert_matches(whole, problem)
    for rows in ([0], [6, 4], list(range(149, 60, -1))):
        part = problem_here([token_slots[r] for r in rows], **options)
        part.x, part.y = problem.x[rows].clone(), problem.y[rows].clone()
        part.lora_a, part.lora_b, part.ranks = problem.lora_a, problem.lora_b, problem.ranks
        assert run(part, "triton-invariant").equal(whole[rows])
