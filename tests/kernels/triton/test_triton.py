"""The Triton kernels against the float64 reference; in the interpreter where there is no GPU.

What all backends have in common is in `test_lora_linear.py`.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from multilora_kernels import column_major, lora_linear
from multilora_kernels.configs import default_expand, default_shrink
from multilora_kernels.configs.config_facts import Workload
from multilora_kernels.triton import expand
from multilora_kernels.triton.combine import pays_before_expand
from multilora_kernels.triton.launch import Launch

from ..tolerances import assert_close
from .triton_problems import DEVICE, assert_matches, poisoned_memory, problem_here, run, watched

INTERLEAVED = [i % 6 - 1 for i in range(45)]
POPULARITY = {
    "one-token": [2],
    "one-adapter": [5] * 67,
    "uniform": np.random.default_rng(2).integers(0, 8, 63).tolist(),
    "zipf": np.minimum(np.random.default_rng(3).zipf(1.5, 77) - 1, 7).tolist(),
    "all-different": [3, 0, 7, 1, 6, 2, 5, 4],
    "none": [-1] * 5,
    "interleaved": INTERLEAVED,
}


@pytest.fixture(autouse=True)
def _watched_and_poisoned() -> Iterator[None]:
    with poisoned_memory(), watched():
        yield


@pytest.mark.parametrize("token_slots", POPULARITY.values(), ids=POPULARITY.keys())
def test_any_popularity_matches_the_reference(token_slots):
    problem = problem_here(token_slots, widths=(5, 70, 33, 1, 9))
    assert_matches(run(problem), problem)


@pytest.mark.parametrize(
    ("rank", "max_rank"),
    # 1: the lowest. 16 and 17: one block, and one beyond. 33: no load or block ends there.
    # 7 of 7: rows too short for wide loads. 65 and 200: more than one block of the widest kind.
    [(1, 8), (7, 7), (16, 16), (17, 32), (33, 64), (65, 128), (200, 200)],
)
def test_any_rank_beside_a_full_one(rank, max_rank):
    problem = problem_here(
        [0, 1, 1, -1, 0] * 4,
        slots=2,
        max_rank=max_rank,
        ranks=[[rank, max_rank]],
        dtype=torch.bfloat16,
    )
    assert_matches(run(problem), problem)


@pytest.mark.parametrize("tile_rows", [1, 5, 128])
def test_any_tile_size_of_the_plan(tile_rows):
    """Blocks of 16 tokens cut longer tiles into parts, and leave shorter ones alone."""
    problem = problem_here([0] * 70 + [1, -1, 2] + [3] * 19, tile_rows=tile_rows)
    assert_matches(run(problem), problem)


def test_prefill_blocks():
    problem = problem_here([i * 4 // 130 for i in range(130)], tile_rows=128, k=72)
    assert_matches(run(problem), problem)


@pytest.mark.parametrize("k", [1, 300, 1100])
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


def test_rows_of_b_past_2_to_the_31_elements():
    """Within one slot and one block of columns; the memory between them is never touched."""
    problem = problem_here([1, 0, 1], slots=2, widths=(40,), dtype=torch.bfloat16, ranks=[[16, 11]])
    far, (weights,) = 2**26, problem.lora_b
    slots, ones, width, rank = weights.shape
    assert (width - 1) * far > 2**31
    allocated = torch._C._VariableFunctions.empty
    storage = allocated((width - 1) * far + slots * rank, dtype=weights.dtype, device=DEVICE)
    apart = storage.as_strided((slots, ones, width, rank), (rank, rank, far, 1))
    problem.lora_b = [apart.copy_(weights)]
    assert_matches(run(problem), problem)


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
