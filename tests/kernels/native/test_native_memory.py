"""The C kernels touch nothing beside their tensors, nor beside their scratch memory.

Every tensor ends, or begins, where memory does that nobody may touch. Whoever does is killed: so
this runs in a process of its own.
"""

import ctypes
import mmap
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from multilora_kernels import OutputFactors, lora_expand, lora_linear, lora_shrink
from multilora_kernels.native import segment_gemm

from ..problems import Problem, make_problem

ROOT = Path(__file__).parents[3]
PAGE = mmap.PAGESIZE
DTYPES = torch.float32, torch.bfloat16, torch.float16
# The last slot has all ranks that there are.
BATCHES = [2], [2, 1, 2], [2] * 7, [i % 4 - 1 for i in range(37)], [2] * 33 + [0, -1]
WIDTHS, RANKS = (5, 70, 33, 1), [[1, 9, 27]] * 4


def guarded(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy between two pages of which nobody may touch anything, up against one of them."""
    size = tensor.nbytes
    between = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, between + 2 * PAGE)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    for page in (start, start + PAGE + between):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), PAGE, 0) == 0
    first = PAGE + (between - size if at_end else 0)
    own = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=first)
    return own.view(tensor.shape).copy_(tensor)


def compute(problem: Problem, at_end: bool, by_column: bool) -> torch.Tensor:
    """The result of `lora_linear` and of both halves, all of it in guarded memory."""

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return guarded(tensor, at_end)

    x, ranks, plan = own(problem.x), own(problem.ranks), problem.plan
    a = [own(each) for each in problem.lora_a]
    b = [own(each.mT).mT if by_column else own(each) for each in problem.lora_b]
    plan.buffer = plan.host = own(plan.buffer)
    factors = OutputFactors(own(torch.zeros(3, sum(WIDTHS))), own(torch.ones_like(ranks)))
    y = own(problem.y)
    lora_linear(y, x, a, b, ranks, plan, factors=factors, backend="native")
    h, halves = own(torch.empty(len(a), len(x), 27)), own(problem.y)
    lora_shrink(h, x, a, ranks, plan, backend="native")
    lora_expand(halves, h, b, ranks, plan, backend="native")
    assert halves.equal(y)
    return y


def compute_all() -> None:
    """Every kind of product once: types, ways to store B, few rows and many, threads."""
    at_end = True
    segment_gemm._Scratch.memory = lambda _, floats: guarded(torch.empty(floats), at_end)
    for dtype, weights, k, token_slots in product(DTYPES, DTYPES, (33, 64), BATCHES):
        options = {"dtype": dtype, "weight_dtype": weights, "k": k, "max_rank": 27, "slots": 3}
        problem = make_problem(token_slots, widths=WIDTHS, ranks=RANKS, margin=0, **options)
        if len(token_slots) > 3 and k == 64:  # the plan's last tokens have no activations
            problem.x, problem.y = problem.x[:-2], problem.y[:-2]
        results = []
        for at_end, by_column in product((True, False), repeat=2):
            torch.set_num_threads(1 + by_column)
            results.append(compute(problem, at_end, by_column))
        assert all(result.equal(results[0]) for result in results)
    print("all")


def touch_what_lies_behind() -> None:
    tensor = guarded(torch.zeros(5), at_end=True)
    ctypes.string_at(tensor.data_ptr(), tensor.nbytes + 1)


@pytest.mark.parametrize(
    ("what", "is_killed"), [(compute_all, False), (touch_what_lies_behind, True)]
)
def test_nothing_beside_the_tensors_is_touched(what, is_killed):
    call = f"from {__name__} import {what.__name__} as call; call()"
    command = [sys.executable, "-X", "faulthandler", "-c", call]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode < 0) == is_killed, done.stderr[-3000:]
    assert is_killed or done.stdout.endswith("all\n"), done.stderr[-3000:]
