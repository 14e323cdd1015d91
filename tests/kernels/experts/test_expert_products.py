"""Adapters of experts on CPUs, against the specification in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora_kernels.experts import ACTIVATIONS, ExpertProducts, PackedExperts
from multilora_kernels.experts.pairs import MAX_PAIRS, PairSorter
from multilora_kernels.native import is_available

from .expert_problems import make_experts, packed

pytestmark = pytest.mark.skipif(not is_available(), reason="no C compiler")

RELATIVE_RMS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
MIXED = [0, 1, -1, 3, 0, 2, 2, -1, 1, 0, 3]

PACKINGS = [
    pytest.param(torch.float32, 1, id="float32"),
    pytest.param(torch.bfloat16, 1, id="bfloat16"),
    pytest.param(torch.bfloat16, 2, id="bfloat16-words"),
]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(found).all(), "there are values that are not finite"
    error = (found.double() - expected).pow(2).mean().sqrt()
    size = expected.pow(2).mean().sqrt()
    assert error / size <= RELATIVE_RMS[found.dtype], f"relative RMS error {error / size:.2e}"


@pytest.mark.parametrize(("dtype", "word"), PACKINGS)
@pytest.mark.parametrize("by_column", [True, False], ids=["columns", "rows"])
@pytest.mark.parametrize("fused", [False, True], ids=["two-slices", "fused"])
def test_rows_with_adapters_are_what_the_specification_says(dtype, word, by_column, fused):
    problem = make_experts(MIXED, dtype=dtype, word=word, by_column=by_column, fused=fused)
    assert_close(problem.found(), problem.expected())


@settings(max_examples=60, deadline=None)
@given(
    token_slots=st.lists(st.integers(-1, 3), min_size=1, max_size=40),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_any_distribution_of_pairs_is_what_the_specification_says(
    token_slots, experts, top_k, seed
):
    problem = make_experts(
        token_slots, experts=max(experts, top_k), top_k=top_k, seed=seed, max_rank=4
    )
    assert_close(problem.found(), problem.expected())


@pytest.mark.parametrize(("dtype", "word"), PACKINGS)
@pytest.mark.parametrize("inner", [8, 32, 40, 80])
@pytest.mark.parametrize("fused", [False, True], ids=["two-slices", "fused"])
def test_widths_that_packing_pads_and_that_end_in_part_of_a_strip(dtype, word, inner, fused):
    problem = make_experts(MIXED, dtype=dtype, word=word, inner=inner, k=96, fused=fused)
    assert_close(problem.found(), problem.expected())


@pytest.mark.parametrize(("dtype", "word"), PACKINGS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swigluoai"])
def test_other_activations_than_silu(dtype, word, activation):
    """GPT-OSS's has gates and what they multiply in turns, which one slice holds."""
    problem = make_experts(MIXED, dtype=dtype, word=word, inner=64, fused=True)
    problem.activation = activation
    assert_close(problem.found(), problem.expected())


def test_gpt_oss_bounds_gates_and_what_they_multiply_which_take_turns():
    gate_up = torch.tensor([[1.0, 2.0, 9.0, -8.0]])
    gates = torch.tensor([[1.0, 7.0]])
    expected = gates * torch.sigmoid(1.702 * gates) * torch.tensor([[3.0, -6.0]])
    torch.testing.assert_close(ACTIVATIONS["swigluoai"](gate_up), expected)


@pytest.mark.parametrize(("dtype", "word"), PACKINGS)
def test_a_rows_bits_do_not_depend_on_other_rows(dtype, word):
    problem = make_experts([row % 4 for row in range(37)], dtype=dtype, word=word)
    found = problem.found()
    for rows in ([5], [5, 9, 20], list(range(3, 30))):
        assert torch.equal(problem.of_rows(rows).found(), found[rows])


def test_a_row_has_the_same_bits_on_any_number_of_threads():
    problem = make_experts([row % 4 for row in range(21)])
    found = problem.found()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(problem.found(), found)
    finally:
        torch.set_num_threads(threads)


def test_more_pairs_than_are_computed_at_a_time():
    problem = make_experts([row % 4 for row in range(MAX_PAIRS // 2 + 10)], k=32, inner=32)
    found = problem.found()
    rows = [0, 1, MAX_PAIRS // 2 - 1, MAX_PAIRS // 2, MAX_PAIRS // 2 + 9]
    assert_close(found[rows], problem.of_rows(rows).expected())


def test_ranks_that_change_count_from_the_next_batch_on():
    problem = make_experts([0, 1, 2])
    products, rows = problem.products(), np.arange(3, dtype=np.int32)
    out = torch.empty_like(problem.x)
    for slot in range(4):
        products.set_ranks(slot, [0, 0], 0)
    problem.w13_ranks.zero_()
    problem.w2_ranks.zero_()
    products(out, problem.x, problem.experts, problem.weights, rows, rows)
    assert_close(out, problem.expected())


def test_a_batch_of_the_same_size_as_the_last_one_has_its_own_pairs():
    """What describes a batch is kept for the next one of equal size."""
    problem = make_experts(MIXED)
    adapted = [row for row, slot in enumerate(problem.token_slots) if slot >= 0]
    products, rows = problem.products(), np.arange(len(adapted), dtype=np.int32)
    for order in (adapted, adapted[::-1], [adapted[0]] * len(adapted), adapted):
        batch = problem.of_rows(order)
        out = torch.empty_like(batch.x)
        slots = np.array(batch.token_slots)
        products(out, batch.x, batch.experts, batch.weights, rows, slots)
        assert_close(out, batch.expected())


def test_biases_are_added_before_the_activation_and_before_the_sum():
    weights, bias = torch.zeros(3, 32, 16), torch.arange(96.0).view(3, 32)
    experts = PackedExperts(packed_weights(weights), 1, bias)
    y = torch.empty(4, 32)
    segments = np.array([[2, 0, 1], [0, 1, 3]], dtype=np.int32)
    experts.multiply(y, torch.ones(4, 16), segments)
    assert torch.equal(y, bias[[2, 0, 0, 0]])


def packed_weights(weights: torch.Tensor) -> torch.Tensor:
    return weights  # zeros look alike in any order


class TestPairs:
    """A step's pairs are sorted once."""

    def test_equal_pairs_follow_each_other_and_experts_are_segments(self):
        pairs = PairSorter(3, 4).sort(np.array([[2, 0], [0, 1], [2, 0]]), np.array([1, 0, 1]))
        assert pairs.segments.tolist() == [[0, 0, 3], [1, 3, 1], [2, 4, 2]]
        assert pairs.tokens.tolist() == [1, 0, 2, 1, 0, 2]
        assert pairs.places.tolist() == [[4, 1], [0, 3], [5, 2]]

    def test_long_runs_of_a_pair_are_cut_into_tiles(self):
        sorter = PairSorter(2, 3)
        pairs = sorter.sort(np.full((300, 1), 2), np.ones(300, dtype=np.int64))
        starts = pairs.plan[sorter.layout.tile_start][:3].tolist()
        lengths = pairs.plan[sorter.layout.tile_length][:3].tolist()
        assert (starts, lengths) == ([0, 128, 256], [128, 128, 44])
        assert pairs.plan[sorter.layout.tile_slot][:3].tolist() == [5, 5, 5]

    @pytest.mark.parametrize(
        ("experts", "slots", "name"),
        [([[4]], [0], "experts"), ([[-1]], [0], "experts"), ([[0]], [2], "token_slots")],
    )
    def test_what_is_out_of_bounds_is_an_error(self, experts, slots, name):
        with pytest.raises(ValueError, match=f"{name} must be between 0 and"):
            PairSorter(2, 4).sort(np.array(experts), np.array(slots))


def test_weights_of_another_size_than_the_slots_are_an_error():
    problem = make_experts(MIXED)
    w13, w2 = packed(torch.zeros(6, 128, 64), 1), packed(torch.zeros(6, 64, 32), 1)
    with pytest.raises(ValueError, match="expected weights of 6 experts of width 48 or padded"):
        ExpertProducts(w13, w2, problem.adapters, torch.mul)


def test_weights_of_a_type_without_a_product_are_an_error():
    with pytest.raises(ValueError, match="expected float32 or bfloat16 weights in blocks of 16"):
        PackedExperts(torch.zeros(2, 32, 32, dtype=torch.float16), 1)
