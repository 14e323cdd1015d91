"""The Triton kernels against the float64 reference; in the interpreter where there is no GPU."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from multilora_kernels import (
    column_major,
    lora_expand,
    lora_linear,
    lora_shrink,
    reference,
)
from multilora_kernels.configs import default_expand, default_shrink
from multilora_kernels.configs.config_facts import Workload
from multilora_kernels.triton import expand
from multilora_kernels.triton.combine import pays_before_expand
from multilora_kernels.triton.launch import Launch

from ..tolerances import assert_close
from .triton_problems import DEVICE, assert_matches, poisoned_memory, problem_here, run, watched

INTERLEAVED = [i % 6 - 1 for i in range(45)]
ZIPF = np.minimum(np.random.default_rng(3).zipf(1.5, 77) - 1, 7).tolist()
POPULARITY = {
    "one-token": [2],
    "one-adapter": [5] * 67,
    "uniform": np.random.default_rng(2).integers(0, 8, 63).tolist(),
    "zipf": ZIPF,
    "all-different": [3, 0, 7, 1, 6, 2, 5, 4],
    "none": [-1] * 5,
    "interleaved": INTERLEAVED,
}
WIDTHS = {
    "plain": (24,),
    "qkv-gqa": (80, 16, 16),
    "odd": (5, 70, 33, 1, 9),
}


@pytest.fixture(autouse=True)
def _watched_and_poisoned() -> Iterator[None]:
    with poisoned_memory(), watched():
        yield


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("token_slots", POPULARITY.values(), ids=POPULARITY.keys())
def test_any_popularity_matches_the_reference(token_slots, widths):
    problem = problem_here(token_slots, widths=widths)
    assert_matches(run(problem), problem)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_pair_of_dtypes(dtype, weight_dtype):
    problem = problem_here(INTERLEAVED, widths=(24, 9), dtype=dtype, weight_dtype=weight_dtype)
    assert_matches(run(problem), problem)


@pytest.mark.parametrize(
    ("rank", "max_rank"),
    # 1: the lowest. 16 and 17: one block, and one beyond. 13, 33: no load or block ends there.
    # 7 of 7: rows too short for wide loads. 65 and 200: more than one block of the widest kind.
    [(1, 8), (7, 7), (13, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128), (200, 200)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_rank_beside_a_full_one(dtype, rank, max_rank):
    problem = problem_here(
        [0, 1, 1, -1, 0] * 4, slots=2, max_rank=max_rank, ranks=[[rank, max_rank]], dtype=dtype
    )
    assert_matches(run(problem), problem)


@pytest.mark.parametrize("tile_rows", [1, 5, 16, 64, 128])
def test_any_tile_size_of_the_plan(tile_rows):
    """Blocks of 16 tokens cut longer tiles into parts, and leave shorter ones alone."""
    problem = problem_here([0] * 70 + [1, -1, 2] + [3] * 19, tile_rows=tile_rows)
    assert_matches(run(problem), problem)


@pytest.mark.parametrize("tokens", [130, 513])
def test_prefill_blocks(tokens):
    problem = problem_here([i * 4 // tokens for i in range(tokens)], tile_rows=128, k=72)
    assert_matches(run(problem), problem)


@pytest.mark.parametrize("k", [1, 40, 300, 1100])
def test_k_of_any_length_and_split(k):
    """1100: four parts, of which the last is cut short."""
    problem = problem_here([0, 3, 3, -1], k=k)
    assert_matches(run(problem), problem)


@pytest.mark.parametrize("extra_dimension", [True, False], ids=["four-dims", "three-dims"])
@pytest.mark.parametrize("by_column", [False, True], ids=["b-by-row", "b-by-column"])
def test_layouts_of_the_weights(by_column, extra_dimension):
    problem = problem_here(
        INTERLEAVED, widths=(40, 16), extra_dimension=extra_dimension, dtype=torch.bfloat16
    )
    if by_column:
        problem.lora_b = [column_major(b).copy_(b) for b in problem.lora_b]
    assert_matches(run(problem), problem)


def test_slices_of_different_strides_in_one_call():
    """As vLLM's logits layer passes them: a view of fewer rows than the tensor has."""
    problem = problem_here(INTERLEAVED, widths=(40, 40))
    wide = torch.zeros(8, 1, 60, 24, device=DEVICE)[:, :, :40, :16]
    problem.lora_b[1] = wide.copy_(problem.lora_b[1])
    tall = torch.zeros(8, 1, 20, 50, device=DEVICE)[:, :, :16, :40]
    problem.lora_a[1] = tall.copy_(problem.lora_a[1])
    problem.lora_b[0] = column_major(problem.lora_b[0]).copy_(problem.lora_b[0])
    assert_matches(run(problem), problem)


def test_scale_offset_and_columns_outside_the_span():
    problem = problem_here(INTERLEAVED, margin=4)
    actual = run(problem, offset=2, scale=-0.5)
    assert_matches(actual, problem, offset=2, scale=-0.5)
    base = torch.tensor(problem.token_slots) < 0
    assert actual[base].equal(problem.y[base])
    assert actual[:, :2].equal(problem.y[:, :2])
    assert actual[:, 26:].equal(problem.y[:, 26:])


@pytest.mark.parametrize("token_slots", [INTERLEAVED, [-1] * 40], ids=["some", "none"])
def test_overwriting_reads_nothing_and_zeroes_what_no_adapter_covers(token_slots):
    ranks = [[3, 0, 7, 16, 0], [0, 0, 5, 2, 9]]
    problem = problem_here(token_slots, slots=5, widths=(40, 24), ranks=ranks)
    expected = problem.expected(add_inputs=False)[:, :64]
    magnitude = problem.magnitude(add_inputs=False)[:, :64]
    problem.y.fill_(float("nan"))
    actual = run(problem, add_inputs=False)
    assert_close(actual[:, :64], expected, magnitude)
    assert torch.isnan(actual[:, 64:]).all()


def test_rank_zero_leaves_its_slice_untouched():
    problem = problem_here([0, 1, 0], slots=2, widths=(8, 8), ranks=[[0, 4], [4, 0]])
    actual = run(problem)
    assert actual[0, :8].equal(problem.y[0, :8])
    assert actual[1, 8:16].equal(problem.y[1, 8:16])
    assert_matches(actual, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_halves_match_the_reference(dtype):
    problem = problem_here([*ZIPF, -1, -1], widths=(20, 12), k=600, dtype=dtype)
    weights = problem.ranks, problem.plan
    h = torch.empty(2, len(problem.token_slots), 16, device=DEVICE)
    lora_shrink(h, problem.x, problem.lora_a, *weights, scale=0.5, backend="triton")
    expected = reference.lora_shrink(
        problem.x.double(), problem.lora_a, problem.ranks, problem.token_slots, scale=0.5
    )
    assert_close(h, expected, expected.abs())
    y = problem.y.clone()
    lora_expand(y, h, problem.lora_b, *weights, backend="triton")
    assert_matches(y, problem, scale=0.5)


def test_strided_activations_and_ranks():
    problem = problem_here(INTERLEAVED, widths=(16, 8))
    tokens = len(INTERLEAVED)
    wide_x, wide_y = (torch.full((tokens, 90), 7.0, device=DEVICE) for _ in range(2))
    wide_x[:, 5:45], wide_y[:, 9:36] = problem.x, problem.y
    transposed = problem.ranks.T.contiguous().T
    weights = problem.lora_a, problem.lora_b, transposed
    lora_linear(wide_y[:, 9:36], wide_x[:, 5:45], *weights, problem.plan, backend="triton")
    assert_matches(wide_y[:, 9:36], problem)
    assert (wide_y[:, :9] == 7).all()
    assert (wide_y[:, 36:] == 7).all()


@pytest.mark.parametrize("tokens", [1, 10])
def test_tokens_of_the_plan_past_the_activations_are_skipped(tokens):
    problem = problem_here(INTERLEAVED)
    expected, magnitude = problem.expected()[:tokens], problem.magnitude()[:tokens]
    problem.x, problem.y = problem.x[:tokens].clone(), problem.y[:tokens].clone()
    assert_close(run(problem), expected, magnitude)
    assert_close(
        run(problem, add_inputs=False)[:, :24],
        expected[:, :24] - problem.y[:, :24].double(),
        magnitude[:, :24],
    )


@pytest.mark.parametrize("add_inputs", [True, False])
def test_rows_past_the_tokens_that_a_plan_can_have_are_left_alone(add_inputs):
    """Nor does a program look for their part in the plan, which ends before."""
    problem, short = problem_here([1, 0, 2]), problem_here([1])
    problem.plan, problem.token_slots = short.plan, [1, -1, -1]
    actual = run(problem, add_inputs=add_inputs)
    assert actual[1:].equal(problem.y[1:])
    if not add_inputs:
        problem.y[:, :24] = 0
    assert_close(actual[:1], problem.expected()[:1], problem.magnitude()[:1])


def test_no_tokens_is_no_work():
    problem = problem_here([0, 1])
    problem.x, problem.y = problem.x[:0], problem.y[:0]
    run(problem)


def test_offsets_past_2_to_the_31_elements():
    """Weights of the last slot, rows of x and rows of y beyond what 32 bits address.

    The memory between them is reserved, never touched.
    """
    problem = problem_here([1, 0, 1], slots=2, dtype=torch.bfloat16, ranks=[[16, 11]])
    far = 2**31 + 48
    allocated = torch._C._VariableFunctions.empty

    def spread(tensor: torch.Tensor, stride: int) -> torch.Tensor:
        storage = allocated(
            (tensor.size(0) - 1) * stride + tensor[0].numel(), dtype=tensor.dtype, device=DEVICE
        )
        strides = (stride, *tensor[0].contiguous().stride())
        return storage.as_strided(tensor.shape, strides).copy_(tensor)

    expected, magnitude = problem.expected(), problem.magnitude()
    problem.lora_a = [spread(problem.lora_a[0], far)]
    problem.lora_b = [spread(problem.lora_b[0], far)]
    problem.x = spread(problem.x, far // 2)
    y = spread(problem.y, far // 2)
    weights = problem.lora_a, problem.lora_b, problem.ranks
    lora_linear(y, problem.x, *weights, problem.plan, backend="triton")
    assert_close(y.contiguous(), expected, magnitude)


@pytest.fixture(params=[False, True], ids=["sum-in-expand", "sum-before"])
def sum_before(request, monkeypatch) -> bool:
    """Where the planes are added up, whatever pays."""
    monkeypatch.setattr(expand, "pays_before_expand", lambda *_: request.param)
    return request.param


def test_a_sum_beforehand_is_one_launch_between_the_halves(monkeypatch, sum_before):
    kernels = []
    start = Launch.run

    def record(launch: Launch) -> None:
        start(launch)
        kernels.append((launch.kernel.__name__, launch.constants["SPLIT_K"]))

    monkeypatch.setattr(Launch, "run", record)
    run(problem_here(INTERLEAVED, k=1100))
    between = [("combine_kernel", 2)] if sum_before else []
    last = 1 if sum_before else 2
    assert kernels == [("shrink_kernel", 2), *between, ("expand_kernel", last)]


def test_planes_are_summed_beforehand_where_many_column_blocks_would_read_them():
    def pays(parts: int, tokens: int, rank: int, blocks: int, kept=torch.bfloat16) -> bool:
        dtype = torch.float32 if parts > 1 else kept
        planes = torch.empty(parts, 1, tokens, rank, dtype=dtype, device="meta")
        return pays_before_expand(planes, blocks, kept)

    assert pays(8, 256, 64, 32)
    assert not pays(1, 8192, 64, 32)  # the one plane is the sum
    assert not pays(1, 8192, 64, 32, kept=torch.float32)
    assert not pays(8, 256, 64, 1)
    assert not pays(8, 256, 8, 32)
    assert not pays(8, 128, 64, 448)  # decoding


def test_pieces_of_the_second_half_are_the_column_blocks_that_slices_have(monkeypatch):
    spreads = []
    monkeypatch.setattr(Launch, "run", lambda launch: spreads.append(launch.spread))
    run(problem_here([0] * 16, widths=(96, 32, 32)))
    block_n = default_expand(Workload(16, 160, 3, 16, 4, "interpreter", 1)).block_n
    assert spreads[1].pieces == sum(-(-width // block_n) for width in (96, 32, 32)) == 5


def test_a_layer_is_two_launches(monkeypatch):
    kernels = []
    monkeypatch.setattr(Launch, "run", lambda launch: kernels.append(launch.kernel.__name__))
    run(problem_here(INTERLEAVED, widths=(40, 16, 16, 8, 8)))
    assert kernels == ["shrink_kernel", "expand_kernel"]


def test_defaults_split_k_only_while_the_device_is_not_full():
    few = Workload(16, 4096, 1, 16, 2, "sm_90", 132)
    assert default_shrink(few).split_k > 1
    assert default_shrink(replace(few, tokens=8192, slices=3)).split_k == 1
