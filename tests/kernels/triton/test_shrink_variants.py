"""What only a table can ask the shrink kernel for: rows without tensor cores, an early start."""

from dataclasses import replace

import pytest
import torch
from triton.runtime import interpreter

from multilora_kernels import triton as backend
from multilora_kernels.configs import Workload, default_shrink
from multilora_kernels.configs.config_facts import power_of_two_up
from multilora_kernels.triton import product
from multilora_kernels.triton.launch import Batch, device_facts
from multilora_kernels.triton.shrink import prepare_shrink

from ..problems import Problem
from .triton_problems import DEVICE, H100, assert_even, even_problem, poisoned_memory, run, watched

pytestmark = pytest.mark.slow

interpreted = pytest.mark.skipif(
    not backend.INTERPRETED, reason="here these kernels are compiled, not interpreted"
)
VARIANTS = {
    "one row": {"vector_rows": 1},
    "two rows": {"vector_rows": 2},
    "four rows": {"vector_rows": 4},
    "early": {"early": True},
    "both": {"vector_rows": 4, "early": True},
}
# By slot: 1, 2, 3, 4 and 5 rows; the last has more than any variant takes by rows.
TOKEN_SLOTS = [4, 1, 3, -1, 2, 4, 0, 3, 2, 4, 3, 1, 4, 2, 3, 4]


@pytest.fixture(autouse=True)
def _watched_and_poisoned():
    with poisoned_memory(), watched():
        yield


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request) -> dict:
    return request.param


def problem(**changes) -> Problem:
    options = {
        "slots": 5,
        "k": 616,
        "widths": (48, 33),
        "max_rank": 64,
        "ranks": [[64, 9, 16, 1, 33], [7, 64, 0, 40, 12]],
        "dtype": torch.bfloat16,
    }
    return even_problem(TOKEN_SLOTS, **(options | changes))


def chosen(workload: Workload, variant: dict, **changes):
    return replace(default_shrink(workload), **variant, **changes)


def run_with(monkeypatch, problem: Problem, variant: dict, **changes) -> torch.Tensor:
    def choose(workload, *, batch_invariant):
        return chosen(workload, variant, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(product, "choose_shrink", choose)
        return run(problem)


PROBLEMS = {
    "float16": ({"dtype": torch.float16}, {}),
    "float32": ({"dtype": torch.float32}, {}),
    "K of whole parts": ({"k": 512}, {"split_k": 2}),
    "a part longer than a step": ({"k": 1056}, {"block_k": 32, "split_k": 2}),
    "one part": ({}, {"split_k": 1}),
    "several blocks of ranks": ({}, {"block_r": 16}),
    "an odd K": ({"k": 77}, {}),
}


def test_results_are_right(monkeypatch, variant):
    """Past the ranks and between the halves all is NaN."""
    own = problem()
    assert_even(run_with(monkeypatch, own, variant), own.expected())


@pytest.mark.parametrize(("options", "changes"), PROBLEMS.values(), ids=PROBLEMS)
def test_results_are_right_by_rows_however_k_and_ranks_are_cut(monkeypatch, options, changes):
    own = problem(**options)
    assert_even(run_with(monkeypatch, own, {"vector_rows": 4}, **changes), own.expected())


def test_an_early_start_changes_no_bit(monkeypatch):
    own = problem()
    assert torch.equal(run_with(monkeypatch, own, {"early": True}), run(own))


def shrunk(problem: Problem, variant: dict) -> torch.Tensor:
    """h of shape [slices, T, R]; what lies past the ranks is undefined."""
    tokens, k = problem.x.shape
    facts = H100 if backend.INTERPRETED else device_facts(problem.x.device)
    batch = Batch(problem.ranks, problem.plan.buffer, problem.plan.layout, facts)
    slices, max_rank = len(problem.lora_a), problem.lora_a[0].size(-2)
    workload = Workload(
        power_of_two_up(tokens), k, slices, max_rank, 2, facts.architecture, facts.processors
    )
    planes, launch = prepare_shrink(
        problem.x, problem.lora_a, batch, 1.0, chosen(workload, variant)
    )
    launch.run()
    return planes.sum(0)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_row_gets_the_same_bits_whatever_rows_are_multiplied_with_it(rows):
    """Alone in its adapter's block, or beside up to three others."""
    options = {"slots": 1, "k": 616, "widths": (48,), "max_rank": 16, "ranks": [[13]]}
    together = even_problem([0] * rows, dtype=torch.bfloat16, **options)
    found = shrunk(together, {"vector_rows": 4})
    for row in range(rows):
        alone = even_problem([0], dtype=torch.bfloat16, **options)
        for a, b in zip(alone.lora_a, together.lora_a, strict=True):
            a.copy_(b)
        alone.x.copy_(together.x[row : row + 1])
        by_itself = shrunk(alone, {"vector_rows": 4})
        # One row is cut into no fewer parts of K than four.
        assert torch.equal(by_itself[0, 0, :13], found[0, row, :13])


@interpreted
@pytest.mark.parametrize("most", [1, 2, 4])
def test_only_blocks_with_more_rows_use_tensor_cores(monkeypatch, most):
    products = []
    builder = interpreter.interpreter_builder
    dot = builder.create_dot
    monkeypatch.setattr(
        builder, "create_dot", lambda *values: (products.append(values), dot(*values))[1]
    )
    for rows in range(1, 6):
        products.clear()
        own = even_problem(
            [0] * rows,
            slots=1,
            k=256,
            widths=(48,),
            max_rank=16,
            ranks=[[16]],
            dtype=torch.bfloat16,
        )
        shrunk(own, {"vector_rows": most})
        assert (len(products) > 0) == (rows > most), rows


@interpreted
def test_a_block_of_few_rows_reads_its_weights_once():
    """And no more than the true rank, whatever the memory past it holds."""
    from tools.kernels.measure.batches import BatchSpec, Layer, build
    from tools.kernels.measure.counted.counting import count_work

    layer = Layer("small", 512, (64,))
    batch = build(BatchSpec(layer, 8, "distinct", 8, max_loras=2), DEVICE, torch.float16)
    shared = Batch(batch.ranks, batch.plan.buffer, batch.plan.layout, H100)
    workload = Workload(8, 512, 1, 64, 2, "sm_90", 132)
    _, launch = prepare_shrink(
        batch.x, batch.lora_a, shared, 1.0, chosen(workload, {"vector_rows": 4})
    )
    weights = count_work(launch.run, batch).traffic["weights"]
    assert weights.loaded == weights.touched == 2 * 8 * 512 * 2
