"""All kernels of a server are compiled in several processes before any of them is launched.

Triton compiles for real, for sm_90, in processes without its interpreter; only the driver is a
stand-in (`tools/kernels/measure/compiled/without_card.py`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def start(how: str, cache: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled.compiling_ahead", how],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cold(cache) -> dict[str, Any]:
    return start("sound", cache)


def test_a_cold_start_compiles_no_kernel_in_the_process_that_serves(cold):
    assert cold["problems"] == []
    assert cold["processes"] == 2
    assert cold["cached"] == cold["kernels"] > 6
    assert cold["late"] == 0
    assert cold["launched"] > cold["kernels"]


def test_a_warm_start_starts_no_processes(cold, cache):
    assert start("sound", cache) == cold | {"processes": 0}


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("failing", "its process ended with 1: no compiler today"),
        ("dying", "its process ended with 9"),
        ("hanging", "kernels were compiled in 1 s"),
    ],
)
def test_what_failing_processes_leave_is_compiled_in_the_calls(cold, tmp_path, how, problem):
    found = start(how, tmp_path)
    assert any(problem in each for each in found["problems"])
    done_before = 2 if how == "dying" else 0  # each process ends in its second job
    assert found["late"] == found["kernels"] - done_before
    assert found["cached"] == found["kernels"] == cold["kernels"]
    assert found["launched"] == cold["launched"]
