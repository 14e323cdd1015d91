"""The Triton kernels against the float64 reference; in the interpreter where there is no GPU."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from multilora_kernels import (
    BatchPlan,
    PlanLayout,
    TritonUnavailableError,
    column_major,
    lora_expand,
    lora_linear,
    lora_shrink,
    reference,
    resolve_backend,
    triton_availability,
)
from multilora_kernels import triton as backend
from multilora_kernels.configs import default_expand, default_shrink
from multilora_kernels.configs.model import Workload
from multilora_kernels.triton import expand
from multilora_kernels.triton.combine import pays_before_expand
from multilora_kernels.triton.launch import Launch

from .problems import Problem, make_problem
from .tolerances import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
def _poisoned_memory(monkeypatch):
    """Memory that a kernel gets is full of NaN, so that reading what nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def problem_here(token_slots: list[int], *, tile_rows: int = 32, tokens: int = 0, **options):
    """A problem on the device of these tests, and a plan for it of a chosen layout."""
    problem = make_problem(token_slots, **options)
    slots = problem.ranks.size(1)
    plan = BatchPlan(PlanLayout(max(tokens, len(token_slots)), slots, tile_rows), DEVICE)
    plan.update(np.array(token_slots))
    return replace(
        problem,
        x=problem.x.to(DEVICE),
        y=problem.y.to(DEVICE),
        lora_a=[a.to(DEVICE) for a in problem.lora_a],
        lora_b=[b.to(DEVICE) for b in problem.lora_b],
        ranks=problem.ranks.to(DEVICE),
        plan=plan,
    )


def run(problem: Problem, backend: str = "triton", **options) -> torch.Tensor:
    y = problem.y.clone()
    weights = problem.lora_a, problem.lora_b, problem.ranks
    lora_linear(y, problem.x, *weights, problem.plan, backend=backend, **options)
    return y


def assert_matches(actual: torch.Tensor, problem: Problem, **options) -> None:
    assert_close(actual, problem.expected(**options), problem.magnitude(**options))


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


TYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "bfloat16-weights": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize(("dtype", "weight_dtype"), TYPES.values(), ids=TYPES.keys())
def test_a_sum_beforehand_has_the_same_bits(monkeypatch, dtype, weight_dtype):
    """An adapter's rank neither ends a block nor a load, and some tokens have no adapter."""
    ranks = [[13, 24, 3], [0, 9, 24]]
    options = {"widths": (40, 24), "k": 1100, "max_rank": 24, "slots": 3, "ranks": ranks}
    problem = problem_here(
        [0, 1, -1, 2] * 9, dtype=dtype, weight_dtype=weight_dtype, tile_rows=16, **options
    )
    results = []
    for before in (False, True):
        monkeypatch.setattr(expand, "pays_before_expand", lambda *_, answer=before: answer)
        results.append(run(problem))
        assert_matches(results[-1], problem)
    assert results[0].equal(results[1])


def test_a_sum_beforehand_is_one_launch_between_the_halves(monkeypatch, sum_before):
    kernels = []
    start = Launch.run

    def record(launch: Launch) -> None:
        start(launch)
        kernels.append((launch.kernel.__name__, launch.constants["SPLIT_K"]))

    monkeypatch.setattr(Launch, "run", record)
    run(problem_here(INTERLEAVED, k=1100))
    between = [("combine_kernel", 4)] if sum_before else []
    last = 1 if sum_before else 4
    assert kernels == [("shrink_kernel", 4), *between, ("expand_kernel", last)]


def test_planes_are_summed_beforehand_where_many_column_blocks_would_read_them():
    def pays(parts: int, tokens: int, rank: int, blocks: int, kept=torch.bfloat16) -> bool:
        return pays_before_expand(torch.empty(parts, 1, tokens, rank, device="meta"), blocks, kept)

    assert pays(8, 256, 64, 32)
    assert pays(1, 8192, 64, 32)  # half the bytes, at 16 bits
    assert not pays(1, 8192, 64, 32, kept=torch.float32)
    assert not pays(8, 256, 64, 1)
    assert not pays(8, 256, 8, 32)
    assert not pays(8, 128, 64, 448)  # decoding


@pytest.mark.slow
@pytest.mark.parametrize("k", [40, 1100])
def test_two_runs_give_the_same_bits(k):
    problem = problem_here(ZIPF, widths=(40, 16), k=k, dtype=torch.bfloat16)
    assert run(problem).equal(run(problem))


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


REPLAYS = {
    "another-order": [1, 0, 1, 2] * 12,
    "more-adapters": [i % 8 for i in range(48)],
    "fewer-adapters": [4] * 48,
    "base-rows": [-1, 3] * 24,
    "fewer-tokens": [2, 5, -1],
    "no-adapter": [-1] * 48,
}


@pytest.mark.usefixtures("sum_before")
def test_a_step_with_new_plan_contents_is_the_same_launch(monkeypatch):
    """What a captured graph repeats: same kernels, grids, numbers and addresses, any batch."""
    problem = problem_here([0, 1, 2, -1] * 12, widths=(40, 16))
    launched = []
    start = Launch.run

    def record(launch: Launch) -> None:
        arguments = {
            name: value
            for name, value in launch.arguments.items()
            if name not in ("planes", "h", "y")  # new tensors in eager mode
        }
        launched.append((launch.kernel, launch.grid, arguments, launch.constants, launch.options))
        start(launch)

    monkeypatch.setattr(Launch, "run", record)
    run(problem)
    captured, launched[:] = list(launched), []
    for token_slots in REPLAYS.values():
        problem.plan.update(np.array(token_slots))
        problem.token_slots = token_slots + [-1] * (48 - len(token_slots))
        assert_matches(run(problem), problem)
        repeated = captured if max(token_slots) >= 0 else []  # nobody has an adapter: no launch
        for (kernel, grid, arguments, *rest), expected in zip(launched, repeated, strict=True):
            assert (kernel, grid, rest) == (expected[0], expected[1], list(expected[3:]))
            for name, value in arguments.items():
                same = expected[2][name]
                assert value is same if isinstance(value, torch.Tensor) else _equal(value, same)
        launched.clear()


def _equal(one: object, other: object) -> bool:
    if isinstance(one, tuple):
        return all(a is b for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.usefixtures("sum_before")
@pytest.mark.parametrize("kind", ["triton", "triton-invariant"])
def test_a_captured_graph_replays_with_any_batch(kind):
    problem = problem_here([0, 1, 2, -1] * 12, widths=(40, 16), dtype=torch.bfloat16)
    original, y = problem.y.clone(), problem.y
    weights = problem.lora_a, problem.lora_b, problem.ranks
    lora_linear(y, problem.x, *weights, problem.plan, backend=kind)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora_linear(y, problem.x, *weights, problem.plan, backend=kind)
    for token_slots in REPLAYS.values():
        y.copy_(original)
        problem.plan.update(np.array(token_slots))
        problem.token_slots = token_slots + [-1] * (48 - len(token_slots))
        graph.replay()
        assert_matches(y, replace(problem, y=original))


def test_the_grid_of_the_second_half_has_no_empty_column_blocks(monkeypatch):
    grids = []
    monkeypatch.setattr(Launch, "run", lambda launch: grids.append(launch.grid[0]))
    run(problem_here([0] * 16, widths=(96, 32, 32)))
    block_n = default_expand(Workload(16, 160, 3, 16, 4, "interpreter", 1)).block_n
    assert grids[1] == sum(-(-width // block_n) for width in (96, 32, 32)) == 5


def test_a_layer_is_two_launches(monkeypatch):
    kernels = []
    monkeypatch.setattr(Launch, "run", lambda launch: kernels.append(launch.kernel.__name__))
    run(problem_here(INTERLEAVED, widths=(40, 16, 16, 8, 8)))
    assert kernels == ["shrink_kernel", "expand_kernel"]


def test_on_a_cpu_the_backend_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(triton_availability, "_language_is_interpreted", lambda: False)
    with pytest.raises(TritonUnavailableError, match="TRITON_INTERPRET=1 must be set before"):
        triton_availability.require("cpu")


@pytest.mark.parametrize(
    ("at_first", "later", "device"),
    [
        pytest.param("0", "1", "cpu", id="set"),
        pytest.param("1", "0", "cuda", id="unset", marks=pytest.mark.slow),
    ],
)
def test_a_mode_that_changed_after_triton_was_imported_is_refused(at_first, later, device):
    """Triton's own functions would be in one mode and these kernels in the other."""
    script = (
        "import os, triton.language\n"
        f"os.environ['TRITON_INTERPRET'] = '{later}'\n"
        "from multilora_kernels import triton_availability as here\n"
        "try:\n"
        f"    here.require('{device}')\n"
        "except here.TritonUnavailableError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": at_first}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    ours, tritons = "these kernels were", "Triton itself was"
    one, other = (ours, tritons) if later == "1" else (tritons, ours)
    assert f"{one} imported with TRITON_INTERPRET=1 and {other} without it" in done.stdout
    assert "before anything imports Triton" in done.stdout


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_availability, "is_installed", lambda: False)
    with pytest.raises(TritonUnavailableError, match="pip install 'triton"):
        triton_availability.require("cuda")
    assert resolve_backend("auto", "cuda") == "torch"


def test_a_device_that_triton_does_not_know_is_refused():
    with pytest.raises(ValueError, match="not on meta"):
        resolve_backend("triton", "meta")


def test_defaults_split_k_only_while_the_device_is_not_full():
    few = Workload(16, 4096, 1, 16, 2, "sm_90", 132)
    assert default_shrink(few).split_k > 1
    assert default_shrink(replace(few, tokens=8192, slices=3)).split_k == 1
