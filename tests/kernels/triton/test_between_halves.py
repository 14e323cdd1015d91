"""What lies between the halves: its type, its bits, and how wide it is stored."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from multilora_kernels import lora_linear, lora_shrink
from multilora_kernels import triton as backend
from multilora_kernels.triton import expand
from multilora_kernels.triton.launch import Launch
from multilora_kernels.triton.tiles import store_grain

from ..problems import Problem
from .triton_problems import DEVICE, poisoned_memory, problem_here

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# No load, store or block ends at these ranks, but at the next.
RANKS = [[13, 24, 3], [0, 9, 17]]


def make(k: int, x: torch.dtype, weights: torch.dtype, max_rank: int = 24) -> Problem:
    """Three adapters in two slices; K of 40 stays whole, K of 1100 is cut."""
    options = {"widths": (40, 24), "k": k, "max_rank": max_rank, "slots": 3, "ranks": RANKS}
    slots = [0, 1, -1, 2] * 6
    return problem_here(slots, tile_rows=16, dtype=x, weight_dtype=weights, **options)


def run(problem: Problem, y_dtype: torch.dtype) -> torch.Tensor:
    y = problem.y.to(y_dtype, copy=True)
    weights = problem.lora_a, problem.lora_b, problem.ranks
    lora_linear(y, problem.x, *weights, problem.plan, backend="triton")
    return y


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[Launch]]:
    """What is launched, with memory that is NaN before anybody has written to it."""
    seen: list[Launch] = []
    start = Launch.run

    def record(launch: Launch) -> None:
        start(launch)
        seen.append(launch)

    monkeypatch.setattr(Launch, "run", record)
    with poisoned_memory():
        yield seen


# y, x, weights: what h is kept in.
KEPT = {
    (BF16, BF16, BF16): BF16,
    (FP16, FP16, FP16): FP16,
    (FP32, FP32, FP32): FP32,
    (FP32, BF16, BF16): FP32,
    (BF16, FP32, BF16): BF16,
    (BF16, BF16, FP32): FP32,
}


@pytest.mark.parametrize(
    ("types", "kept"), KEPT.items(), ids=lambda value: str(value).replace("torch.", "")
)
def test_a_product_over_all_of_k_is_stored_in_the_type_that_it_is_multiplied_in(
    launches, types, kept
):
    y, x, weights = types
    run(make(40, x, weights), y)
    first, last = launches
    planes = first.arguments["planes"]
    assert (planes.dtype, planes.size(0)) == (kept, 1)
    assert last.arguments["planes"] is planes


def test_parts_of_k_are_added_up_before_they_are_rounded(launches):
    run(make(1100, BF16, BF16), BF16)
    planes = launches[0].arguments["planes"]
    assert planes.dtype == FP32
    assert planes.size(0) > 1


@pytest.mark.parametrize("types", [(BF16, BF16, BF16), (FP16, FP16, FP16), (BF16, FP32, BF16)])
def test_rounding_where_it_is_stored_or_where_it_is_read_gives_the_same_bits(monkeypatch, types):
    y, x, weights = types
    problem = make(40, x, weights)
    stored_rounded = run(problem, y)
    monkeypatch.setattr(backend, "kept_type", lambda *_: FP32)
    assert not stored_rounded.equal(problem.y.to(y))
    assert run(problem, y).equal(stored_rounded)


@pytest.mark.parametrize("k", [40, 1100], ids=["whole", "cut"])
def test_the_first_half_alone_is_rounded_once(k):
    problem = make(k, FP16, FP16)
    results = {}
    for dtype in (FP32, FP16):
        h = results[dtype] = torch.full((2, 24, 24), 7.0, dtype=dtype, device=DEVICE)
        lora_shrink(h, problem.x, problem.lora_a, problem.ranks, problem.plan, backend="triton")
    rounded = results[FP32].to(FP16)
    assert not rounded.float().equal(results[FP32])
    assert rounded.equal(results[FP16])


def written_to(h: torch.Tensor, problem: Problem) -> list[list[int]]:
    """Per slice and slot, the columns of h that are not the NaN that was there before."""
    slots = torch.tensor(problem.token_slots)
    columns = ~torch.isnan(h.float().cpu())
    return [
        [int(columns[i][slots == slot].any(0).sum()) for slot in range(3)] for i in range(len(h))
    ]


@pytest.mark.parametrize(
    ("kernel", "k", "dtype", "ends"),
    [
        ("shrink_kernel", 40, BF16, [[16, 24, 8], [0, 16, 24]]),
        ("shrink_kernel", 1100, BF16, [[16, 24, 4], [0, 12, 20]]),
        ("combine_kernel", 1100, BF16, [[16, 24, 8], [0, 16, 24]]),
        ("combine_kernel", 1100, FP32, [[16, 24, 4], [0, 12, 20]]),
    ],
)
def test_stores_end_with_the_16_bytes_in_which_a_rank_ends(
    monkeypatch, launches, kernel, k, dtype, ends
):
    monkeypatch.setattr(expand, "pays_before_expand", lambda *_: kernel == "combine_kernel")
    problem = make(k, dtype, dtype)
    assert torch.isfinite(run(problem, dtype)).all()
    launch = next(each for each in launches if each.kernel.__name__ == kernel)
    h = launch.arguments["h"] if kernel == "combine_kernel" else launch.arguments["planes"][0]
    assert written_to(h, problem) == ends
    assert not torch.isfinite(h[:, torch.tensor(problem.token_slots) < 0]).any()


def test_rows_that_wide_stores_do_not_fit_end_at_the_rank(launches):
    problem = make(40, BF16, BF16, max_rank=25)
    run(problem, BF16)
    assert written_to(launches[0].arguments["planes"][0], problem) == RANKS


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (lambda h: h, 8),
        (lambda h: h.float(), 4),
        (lambda h: h[..., :20], 1),
        (lambda h: h.view(2, 6, 80)[..., :64], 8),
        (lambda h: h.view(-1)[: 2 * 6 * 36].view(2, 6, 36), 1),
        (lambda h: h.view(-1)[1:].as_strided((2, 6, 40), (244, 40, 1)), 1),
    ],
    ids=["bfloat16", "float32", "narrow", "longer-rows", "odd-rows", "odd-slices"],
)
def test_stores_are_wide_where_all_rows_begin_at_16_bytes(view: Callable, expected):
    assert store_grain(view(torch.zeros(2, 12, 40, dtype=BF16))) == expected


def test_h_is_stored_16_bytes_at_a_time():
    """In a process of its own: this one has Triton in interpreter mode."""
    short, *others = "qkv decode, R 64, T 64", "o mixed, R 64, T 256", "qkv prefill, R 64, T 2048"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernels.report", "--arch", "90", "--json"]
    for case in (short, *others):
        command += ["--case", case]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    stored = {(r["kernel"], r["case"]): r["stores"] for r in compiled if r["kernel"] != "expand"}
    assert stored.keys() >= {("shrink", case) for case in (short, *others)} | {
        ("combine", others[0])
    }
    for (kernel, case), widths in stored.items():
        # Decoding has blocks of 16 x 16 on 128 threads for the lowest ranks: two values for each.
        some = {"8", "16"} if (kernel, case) == ("shrink", short) else {"16"}
        assert set(*widths.values()) == some, (kernel, case)
