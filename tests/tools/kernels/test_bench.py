"""The benchmark: fair timing, a check before every timing, and a command that runs anywhere."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from multilora_kernels import lora_linear
from tools.kernels import bench
from tools.kernels.measure.agreement import TOLERANCES, Expected
from tools.kernels.measure.baselines import GemmLoop
from tools.kernels.measure.batches import BatchSpec, Layer, build
from tools.kernels.measure.comparison import compare
from tools.kernels.measure.contenders import ContenderUnavailableError, Entered, Multilora
from tools.kernels.measure.limits import adapter_work
from tools.kernels.measure.ratios import paired_ratio
from tools.kernels.measure.timing import GraphTimer, WallTimer

SPEC = BatchSpec(Layer("small", 32, (24, 8)), 12, "zipf", "mixed", max_loras=6, active=4)


@pytest.fixture
def batch():
    batch = build(SPEC, dtype=torch.float32)
    slots = batch.token_slots.copy()
    slots[[2, 7]] = -1  # rows of the base model
    batch.plan.update(slots)
    return replace(batch, token_slots=slots)


class Wrong:
    """A contender with a mistake that is made after the right result."""

    def __init__(self, mistake):
        self.name = "wrong"
        self._mistake = mistake

    def prepare(self, batch):
        right = GemmLoop().prepare(batch)

        def call():
            before = batch.y.clone()
            right()
            self._mistake(batch, before)

        return call


class FixedTimer:
    """Says that the n-th call takes n + 1 microseconds."""

    method = "fixed"

    def paired(self, calls, repetitions):
        return [[n + 1.0] * repetitions for n in range(len(calls))]


def overwrite(batch, before):
    batch.y -= before


def touch_a_base_row(batch, before):
    batch.y[2] += 0.1


def leave_a_row_out(batch, before):
    batch.y[0] = before[0]


def lose_the_last_rank(batch, before):
    slot = batch.token_slots[0]
    last = batch.spec.slot_ranks()[slot] - 1
    h = batch.x[0] @ batch.lora_a[0][slot, 0, last]
    batch.y[0, :24] -= h * batch.lora_b[0][slot, 0, :, last]


def not_finite(batch, before):
    batch.y[2, 3] = math.nan


MISTAKES = (overwrite, touch_a_base_row, leave_a_row_out, lose_the_last_rank, not_finite)


@pytest.mark.parametrize("backend", ["torch", "native", "loop"])
def test_right_contenders_agree_with_the_expectation(batch, backend):
    contender = GemmLoop() if backend == "loop" else Multilora(backend)
    error = Expected(batch).relative_error(contender.prepare(batch))
    assert error <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_wrong_contender_is_reported_and_not_timed(batch, mistake):
    contenders = [Multilora("torch"), Wrong(mistake), GemmLoop()]
    result = compare("case", "group", batch, contenders, FixedTimer(), None, 3)
    assert list(result.microseconds) == ["multilora (torch)", "loop of torch.mm"]
    assert result.not_timed["wrong"].startswith("wrong: relative RMS error")
    assert result.ratios == {
        "loop of torch.mm": pytest.approx(2 / 3),
        "base layer": pytest.approx(2 / 1),
    }


def test_a_contender_that_raises_does_not_stop_the_others(batch):
    class Broken:
        name = "broken"

        def prepare(self, batch):
            raise RuntimeError("out of everything")

    result = compare("case", "group", batch, [Broken(), GemmLoop()], FixedTimer(), None, 3)
    assert result.not_timed == {"broken": "failed: RuntimeError: out of everything"}
    assert list(result.microseconds) == ["loop of torch.mm"]
    assert not result.ratios  # there is no first contender's time to compare with


def test_the_least_work_counts_true_ranks_of_active_adapters_once(batch):
    batch = build(replace(SPEC, popularity="distinct", tokens=9), dtype=torch.bfloat16)
    slots, ranks = batch.token_slots, SPEC.slot_ranks()
    active = np.unique(slots)
    assert len(active) == 4
    weights = sum(int(ranks[slot]) * (2 * 32 + 24 + 8) for slot in active)
    activations = 9 * (32 + 2 * (24 + 8))  # x read, y read and written
    work = adapter_work(batch)
    assert work.bytes == 2 * (weights + activations)
    assert work.operations == sum(2 * int(ranks[slot]) * (2 * 32 + 24 + 8) for slot in slots)


def test_calls_alternate_and_no_call_always_follows_the_same_one():
    ran, now = [], [0.0]

    def call(name, seconds):
        def run():
            ran.append(name)
            now[0] += seconds

        return run

    timer = WallTimer(clock=lambda: now[0])
    times = timer.paired([call("a", 1e-6), call("b", 2e-6), call("c", 3e-6)], 3)
    assert times == [pytest.approx([n] * 3) for n in (1.0, 2.0, 3.0)]
    measured = "".join(ran[-9:])
    assert measured == "abcbcacab"


def test_a_paired_ratio_is_not_moved_by_drift_or_an_interruption():
    drift = np.linspace(1, 3, 51)
    slow, fast = 1.2 * drift, drift.copy()
    fast[7] *= 40
    ratio = paired_ratio(slow.tolist(), fast.tolist())
    assert ratio.value == pytest.approx(1.2)
    assert ratio.error < 1e-9


class NeedsAGpu:
    name = "elsewhere"

    def prepare(self, batch):
        raise ContenderUnavailableError("needs a GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command would measure the GPU")
def test_without_a_gpu_the_command_measures_the_cpu_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    entered = Entered((NeedsAGpu(),), (("broken", "ImportError: no module"),))
    monkeypatch.setattr(bench, "load_contenders", lambda: entered)
    file = tmp_path / "bench.json"
    assert bench.main(["--quick", "--case", "decode 8b.qkv zipf mixed", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("NO GPU WAS MEASURED")
    assert "left out: elsewhere: needs a GPU" in printed
    assert "left out: broken: ImportError: no module" in printed
    assert re.search(r"decode, mixed ranks: \d+\.\d\d to loop of torch\.mm \(1 cases\)", printed)

    environment, case, group = map(json.loads, file.read_text().splitlines())
    assert environment["record"] == "environment"
    assert not environment["on_gpu"]
    assert environment["torch"] == torch.__version__
    assert environment["command"].startswith("python -m tools.kernels.bench --quick --case")
    assert environment["left_out"] == {
        "elsewhere": "needs a GPU",
        "broken": "ImportError: no module",
    }
    assert case["record"] == "case"
    assert min(case["microseconds"].values()) > 0
    assert max(case["errors"].values()) <= TOLERANCES[torch.float32]
    assert not case["share_of_peak"]
    assert not case["not_timed"]
    assert group["ratios"]["base layer"]["cases"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command would measure the GPU")
def test_the_command_fails_if_these_kernels_are_wrong(monkeypatch, capsys):
    contenders = [Wrong(overwrite), GemmLoop()]
    monkeypatch.setattr(bench, "contenders_for", lambda device: (contenders, {}))
    assert bench.main(["--quick", "--case", "decode 8b.qkv zipf mixed"]) == 1
    captured = capsys.readouterr()
    assert "decode 8b.qkv zipf mixed: wrong wrong: relative RMS error" in captured.err
    assert "| decode 8b.qkv zipf mixed |" in captured.out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graph_replays_compute_and_longer_work_takes_longer():
    device = torch.device("cuda")
    small, large = (torch.ones(size, device=device) for size in (1 << 10, 1 << 28))
    timer = GraphTimer(device)
    times = timer.paired([lambda: small.mul_(1), lambda: large.mul_(1)], 20)
    assert min(times[1]) > 3 * max(times[0])
    assert 0 < timer.floor() < min(times[1])
    batch = build(SPEC, device, torch.bfloat16)
    call = Multilora("triton").prepare(batch)
    batch.y.zero_()
    timer.paired([call], 5)
    once = torch.zeros_like(batch.y)
    lora_linear(once, batch.x, batch.lora_a, batch.lora_b, batch.ranks, batch.plan)
    assert batch.y.abs().sum() > 5 * once.abs().sum()  # every replay adds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_command_measures_it(tmp_path):
    file = tmp_path / "bench.json"
    assert bench.main(["--quick", "--case", "decode 8b.qkv zipf mixed", "--json", str(file)]) == 0
    environment, case, _ = map(json.loads, file.read_text().splitlines())
    assert environment["on_gpu"]
    assert 0 < case["share_of_peak"]["multilora (triton)"] < 1.5
