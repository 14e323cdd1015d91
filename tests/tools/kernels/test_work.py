"""Work is counted where it happens: bytes by tensor, programs, launches; in the interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from multilora_kernels import triton as backend
from multilora_kernels.triton.launch import DeviceFacts
from tools.kernels import work
from tools.kernels.measure.batches import BatchSpec, Layer, LayerBatch, build
from tools.kernels.measure.contenders import Multilora
from tools.kernels.measure.counted.counting import (
    LaunchWork,
    Traffic,
    Work,
    count_work,
)
from tools.kernels.measure.counted.interpreter import launched_as_on

interpreted = pytest.mark.skipif(
    not backend.INTERPRETED, reason="here these kernels are compiled, not interpreted"
)
ROOT = Path(__file__).parents[3]
SPEC = BatchSpec(Layer("small", 128, (96, 32)), tokens=8, popularity="distinct", max_loras=8)
H100 = DeviceFacts("sm_90", 132, pdl=False)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def batch() -> LayerBatch:
    return build(SPEC, dtype=torch.float16)


@interpreted
def test_afterwards_the_interpreter_is_as_before(batch):
    def state() -> tuple:
        builder = vars(interpreter.interpreter_builder).items()
        return (
            {k: v for k, v in builder if not k.startswith("grid")},
            interpreter.InterpretedFunction.run,
            interpreter._patch_lang,
            interpreter._get_np_dtype,
            tl.tensor.__init__,
            tl.block_type.__init__,
            backend.device_facts,
        )

    before = state()
    with launched_as_on(H100):
        count_work(Multilora().prepare(batch), batch)
    assert state() == before


@interpreted
def test_a_layer_reads_its_true_ranks_and_nothing_more(batch):
    counted = work.count_contender(Multilora(), batch).work
    required = work.required_weight_bytes(batch)
    assert required == 2 * 2 * (8 + 16 + 32 + 64) * (128 + 96 + 128 + 32)
    assert counted.traffic["weights"].touched == counted.traffic["weights"].loaded == required
    assert (counted.kernels, counted.operators, counted.cleared) == (2, (), 0)


@interpreted
@pytest.mark.parametrize(
    ("case", "launches"),
    [
        ("decode, rank 64", 2),
        ("prefill, mixed ranks", 3),
        pytest.param("prefill, mixed ranks, qkv", 2),
        pytest.param("decode, 8 of 64 slots", 2),
    ],
)
def test_what_lies_between_the_halves_is_a_small_part_of_the_traffic(case, launches):
    """At most 15 % of what must move: weights up to the true ranks, x, and y in and out."""
    batch = build(work.CASES[case], dtype=work.DTYPE)
    counted = work.count_contender(Multilora(), batch).work
    own = counted.traffic["intermediate"]
    y_bytes = batch.y.numel() * batch.y.element_size()
    required = work.required_weight_bytes(batch) + batch.x.nbytes + 2 * y_bytes
    assert 0 < own.loaded + own.stored <= 0.15 * required
    assert len(counted.launches) == launches


@interpreted
def test_a_prefill_that_does_not_cut_k_is_two_launches_with_16_bits_between_them():
    """Many column blocks read h, at the highest rank: float32 planes would be summed beforehand."""
    layer = Layer("wide", 128, (4096,))
    spec = BatchSpec(layer, 512, "distinct", 16, max_loras=4, max_rank=512, run_length=128)
    counted = work.count_contender(Multilora(), build(spec, dtype=work.DTYPE)).work
    assert [launch.kernel for launch in counted.launches] == ["shrink_kernel", "expand_kernel"]
    own, column_blocks = counted.traffic["intermediate"], 4096 // 128
    assert own.stored == 512 * 16 * 2
    assert own.stored <= own.loaded <= column_blocks // 3 * own.stored


@interpreted
def test_a_wrong_result_is_no_basis_for_a_comparison(batch):
    class Idle:
        name = "idle"

        def prepare(self, batch: LayerBatch):
            return lambda: None

    with pytest.raises(RuntimeError, match=r"idle is off by 1.0e\+00 .* for small"):
        work.count_contender(Idle(), batch)


def test_the_table_shows_ratios_to_the_first():
    def counted(name: str, programs: int) -> work.Counted:
        launch = LaunchWork("kernel", programs, with_weights=1, exited=0)
        kinds = ("weights", "activations", "intermediate", "metadata")
        traffic = dict.fromkeys(kinds, Traffic())
        return work.Counted(name, Work((launch,), (), 0, traffic), 0.0)

    lines = work.table([counted("one", 10), counted("other", 1250)]).splitlines()
    assert lines[0] == "| | one | other | ratio |"
    assert "| programs | 10 | 1,250 | 0.008 |" in lines
    assert "| - that exit at once | 0 | 0 | - |" in lines


COMPARED = ("decode, mixed ranks, qkv", "decode, 8 of 64 slots", "no adapter")


@pytest.fixture(scope="module")
def compared() -> dict[tuple[str, str], dict]:
    """The command's answer by case and contender. It asks for the interpreter by itself."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernels.work", "--json"]
    for case in COMPARED:
        command += ["--case", case]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return {(r["case"], r["contender"]): r for r in records}


with_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="compares with vLLM, which is not installed"
)
OURS, STOCK, SPECIALIZED = "multilora (triton)", "vllm", "vllm (specialized)"


def programs(record: dict) -> int:
    return sum(launch["programs"] for launch in record["launches"])


@with_vllm
class TestAgainstVllm:
    """At full layer size; a wrong result of anybody would have ended the command."""

    def test_everybody_is_counted(self, compared):
        assert set(compared) == {(c, who) for c in COMPARED for who in (OURS, STOCK, SPECIALIZED)}

    @pytest.mark.parametrize("stock", [STOCK, SPECIALIZED])
    @pytest.mark.parametrize("bytes_of", ["loaded", "touched", "sectors"])
    def test_mixed_ranks_read_at_most_three_fifths_of_the_weights(self, compared, stock, bytes_of):
        ours, theirs = (compared[COMPARED[0], who]["traffic"]["weights"] for who in (OURS, stock))
        assert 0 < ours[bytes_of] <= 0.6 * theirs[bytes_of]

    def test_few_adapters_start_a_tenth_of_the_programs(self, compared):
        ours, stock, specialized = (
            programs(compared[COMPARED[1], who]) for who in (OURS, STOCK, SPECIALIZED)
        )
        assert 0 < ours <= 0.1 * stock
        assert ours < specialized

    @pytest.mark.parametrize("stock", [STOCK, SPECIALIZED])
    @pytest.mark.parametrize("case", COMPARED[:2])
    def test_a_layer_is_two_launches_and_clears_nothing(self, compared, case, stock):
        ours, theirs = compared[case, OURS], compared[case, stock]
        assert (len(ours["launches"]), ours["operators"], ours["cleared"]) == (2, [], 0)
        assert (len(theirs["launches"]), theirs["operators"]) == (2, ["zero_"])
        assert theirs["cleared"] > 0

    def test_nobody_starts_anything_for_a_batch_without_adapters(self, compared):
        for who in (OURS, STOCK, SPECIALIZED):
            record = compared[COMPARED[2], who]
            assert (record["launches"], record["operators"]) == ([], [])
