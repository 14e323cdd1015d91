"""The kernels compile for GPUs that are not here: no spills, wide loads, tensor cores."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # compiles for three architectures

# One short and one long batch in model dtype, as most steps are, a layer of one slice (LLVM leaves
# a stack frame there that nothing uses), and the blocks that do not depend on the batch.
CASES = ["qkv decode, R 64", "qkv prefill, R 64, T 8192", "down 8B decode", "qkv invariant"]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """The report of a process of its own: this one has Triton in interpreter mode."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "multilora_kernels.report", "--json"]
    for case in CASES:
        command += ["--case", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_everything_asked_for_was_compiled(compiled):
    kernels = {(r["architecture"], r["kernel"], r["case"].split(",")[0]) for r in compiled}
    assert kernels >= {
        (architecture, kernel, case)
        for architecture in (80, 90, 100)
        for kernel in ("shrink", "expand")
        for case in ("qkv decode", "qkv prefill", "qkv invariant")
    }
    assert "combine" in {r["kernel"] for r in compiled}


def test_nothing_spills_and_every_program_fits_every_card(compiled):
    for result in compiled:
        assert result["spilled_bytes"] == 0, result
        assert result["registers"] <= 255, result
        assert result["shared_bytes"] <= 99 * 1024, result


def test_tensors_are_loaded_16_bytes_at_a_time(compiled):
    """What is narrower are the plan's numbers, and blocks of fewer elements than threads take."""
    for result in compiled:
        assert result["loads"].get("16", 0) > result["loads"].get("8", 0), result
        assert min(map(int, result["loads"])) >= 4, result


def test_products_run_on_tensor_cores(compiled):
    for result in compiled:
        assert (result["tensor_core"] > 0) == (result["kernel"] != "combine"), result


def test_halves_overlap_where_the_card_can(compiled):
    for result in compiled:
        assert result["pdl"] == (result["architecture"] >= 90), result
