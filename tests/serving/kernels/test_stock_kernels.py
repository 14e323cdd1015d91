"""Without a GPU, vLLM's own kernels run in Triton's interpreter, on our slots and our plan.

In float16: the interpreter adds numbers in bfloat16 as if they were whole ones.
"""

from dataclasses import replace

import pytest
import torch

from multilora_kernels.trial.cases import check
from multilora_kernels.trial.kinds import LayerKind
from multilora_kernels.trial.trial_problems import TrialProblem
from tools.kernels.stock_kernels import operators

pytestmark = pytest.mark.serving  # imports vLLM

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = ("float16",) * 3
O_PROJ = LayerKind("linear", 4, 96, (64,), 1, 16, 16, *HALF, True, 64)
KINDS = {
    "one slice": O_PROJ,
    "one slice by rows": replace(O_PROJ, by_column=False),
    "slices of one width": replace(O_PROJ, widths=(48, 48), slices=2, columns=96),
    "slices of two widths": replace(O_PROJ, widths=(64, 32, 32), slices=3, columns=128),
    "written apart": replace(O_PROJ, add_inputs=False),
    "output layer": replace(O_PROJ, widths=(80,), columns=128, by_column=False),
    "shrink": LayerKind("shrink", 4, 96, (), 2, 8, 0, *HALF[:2], "float32"),
    "expand": replace(O_PROJ, operation="expand", inputs=16, a_rank=0, given="float32"),
    "expand behind others": LayerKind(
        *("expand", 4, 16, (40,), 1, 0, 16, "float16", "float32", "float16", True, 80, 32)
    ),
}


@pytest.fixture(autouse=True)
def _vllms_operators(monkeypatch):
    """On a CPU the operators that vLLM has registered have no Triton: these are copies that do."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        found = operators("cpu")
        monkeypatch.setattr(torch.ops.vllm, "lora_shrink", found.shrink)
        monkeypatch.setattr(torch.ops.vllm, "lora_expand", found.expand)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_vllms_kernels_read_our_slots_and_our_plan(kind):
    from vllm_multilora.integration.step import stock_kernels

    problem = TrialProblem(kind, DEVICE, max_tokens=64)
    problem.fill_rests(0.0)
    call = stock_kernels.prepare(kind, problem.weights, problem.layout)
    assert check(call, problem, problem.mixed_batch(9)) == ""


def test_a_batch_without_adapters_launches_nothing(monkeypatch):
    from vllm_multilora.integration.step import stock_kernels

    problem = TrialProblem(O_PROJ, DEVICE, max_tokens=8)
    call = stock_kernels.prepare(O_PROJ, problem.weights, problem.layout)
    monkeypatch.setattr(torch.ops.vllm, "lora_shrink", None)
    batch = problem.mixed_batch(5)
    batch.plan.update(batch.slots * 0 - 1)
    out = batch.out.clone()
    call(out, batch.given, batch.plan)
    assert out.equal(batch.out)


def test_what_vllm_looks_up_is_written_again_after_memory_was_lost():
    from vllm.lora.ops.triton_ops import utils

    from vllm_multilora.integration.step import stock_kernels

    kind = KINDS["slices of two widths"]
    problem = TrialProblem(kind, DEVICE, max_tokens=8)
    problem.fill_rests(0.0)
    call = stock_kernels.prepare(kind, problem.weights, problem.layout)
    own = {each.data_ptr() for each in (*problem.weights.a, *problem.weights.b)}
    known = [
        *utils._LORA_A_PTR_DICT[tuple(each.data_ptr() for each in problem.weights.a)],
        *utils._LORA_B_PTR_DICT[tuple(each.data_ptr() for each in problem.weights.b)],
    ]
    tables = [t for t in known if isinstance(t, torch.Tensor) and t.data_ptr() not in own]
    assert len(tables) == 7
    for table in tables:
        table.zero_()
    stock_kernels.restore_tables()
    assert check(call, problem, problem.mixed_batch(7)) == ""
