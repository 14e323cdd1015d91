"""What is to run on a card runs here as far as it can: listed, and in the interpreter."""

import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.gpu import run, times
from tools.gpu import tests as kernel_tests
from tools.kernels.measure.batches import LAYERS

ROOT = Path(__file__).parents[2]


PARTS = ("compile", "stress", "tests", "times", "sanitizer")


def has_sanitizer() -> bool:
    return shutil.which("compute-sanitizer") is not None


def bare(**more: str) -> dict[str, str]:
    """As on a machine where this checkout is not installed and has no path."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")} | {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        **more,
    }


def test_a_dry_run_lists_all_parts_and_what_they_lack(tmp_path):
    command = [str(ROOT / "tools/gpu/run.sh"), str(tmp_path), "--dry-run"]
    done = subprocess.run(command, env=bare(), capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0].split()[0] for line in lines] == list(PARTS)
    assert "left out: there is no program compute-sanitizer" in lines[-1] or has_sanitizer()


def test_kernel_tests_are_run_by_what_they_tell_and_shared_out_among_processes():
    """Every test is run by one process, and each process begins with the right values."""
    found = []
    for number in range(3):
        done = subprocess.run(
            kernel_tests.command("--collect-only"),
            cwd=ROOT, env=bare(GPU_TESTS_PART=f"{number}/3", TRITON_INTERPRET="1"),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        names = [line for line in done.stdout.splitlines() if "::" in line]
        files = [name.partition("::")[0].removeprefix("tests/kernels/") for name in names]
        assert list(dict.fromkeys(files)) == list(kernel_tests.TESTS)
        found.append(names)
    together = [name for names in found for name in names]
    assert len(together) == len(set(together)) > 150
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
def test_without_a_card_it_says_so(tmp_path):
    command = [str(ROOT / "tools/gpu/run.sh"), str(tmp_path)]
    done = subprocess.run(command, env=bare(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--dry-run says what would be run, --rehearse does it" in done.stderr


@pytest.mark.slow
def test_a_rehearsal_runs_all_parts_and_says_that_nothing_was_measured(tmp_path):
    """Without a card, and on a machine with one but without it. The tests are only collected."""
    results = tmp_path / "results"
    command = [str(ROOT / "tools/gpu/run.sh"), str(results), "--rehearse", "--minutes=20"]
    environment = bare(TRITON_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    logs = {path.stem: path.read_text() for path in results.glob("*.log")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    summary, compiled, stress, found = (
        json.loads((results / f"{name}.json").read_text())
        for name in ("summary", "compile", "stress", "times")
    )
    assert json.loads(done.stdout) == summary
    assert {name: part["code"] for name, part in summary["parts"].items()} == dict.fromkeys(
        PARTS, 0
    )
    assert compiled["architecture"] == "sm_90"
    assert compiled["problems"] == []
    assert compiled["kernels"] == len(list((tmp_path / "cache").glob("*/*.cubin"))) > 4
    for written in (summary, stress, found):
        assert written["measured"] is False
    assert not stress["on_gpu"]
    assert all(case["replays"] > 0 == case["wrong_replays"] for case in stress["cases"].values())
    assert "tests collected" in logs["tests"]
    assert len(found["cases"]) == 10
    assert found["cases_left"] == 0
    assert {case["layer"].partition("/")[0] for case in found["cases"]} == set(LAYERS)
    for case in found["cases"]:
        assert case["microseconds"] == {"multilora (triton)": None, "base layer": None}
        assert (case["floor_microseconds"], case["left_out"]) == (None, {})
    assert set(found["plan_waits"].values()) == {None}
    assert found["compiled_here"] == []
    assert {case["max_rank"] for case in found["cases"]} == {16, 64, 256}
    timed = subprocess.run(
        [sys.executable, "-c", TIMED], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert timed.returncode == 0, timed.stderr
    assert json.loads(timed.stdout) == []


TIMED = """
import json
import torch
from tools.gpu import compile, times
from tools.kernels.measure.contenders import Multilora
from tools.kernels.measure.timing import WallTimer
from tools.kernels.measure.compiled.without_card import launched_without_card

with launched_without_card(compiling=True) as launches:
    for spec in compile.REHEARSED:
        times.time_case(spec, [Multilora("triton")], WallTimer(), None, times.REHEARSAL)
assert len(launches.launched) > 3
print(json.dumps(launches.compiled))
"""
"""Times what a rehearsal compiles; prints which kernels had not been compiled before."""


def test_a_folder_without_vllm_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main([str(tmp_path / "results"), "--vllm", str(tmp_path)])
    assert "python -m tools.gpu.vllm_kernels makes a folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it takes its time")
def test_the_stress_test_finds_what_is_wrong(tmp_path):
    program = (
        "import sys; from tools.gpu import stress\n"
        "def captured(call):\n"
        "    turns = iter(range(99))\n"
        "    return lambda: call() if next(turns) != 2 else None\n"
        "stress.captured = captured\n"
        "sys.exit(stress.main(sys.argv[1:]))"
    )
    out = tmp_path / "stress.json"
    command = [sys.executable, "-c", program, "--out", str(out)]
    environment = bare(TRITON_INTERPRET="1")
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    cases = json.loads(out.read_text())["cases"].values()
    assert all(case["slots_filled"] == 2 for case in cases)
    assert sum(case["wrong_slots"] for case in cases) == 0
    assert sum(case["wrong_replays"] for case in cases) == 1


def test_the_cases_are_the_stated_ones_and_each_is_there_once():
    specs = list(times.cases())
    assert len(specs) == len(set(specs))
    assert {spec.tokens for spec in specs} == {1, 8, 32, 64, 256}
    ranks = {(spec.max_rank, spec.ranks) for spec in specs}
    assert ranks == {(16, 16), (64, 8), (64, 16), (64, 64), (64, "mixed"), (256, 256)}
    assert {spec.layer for spec in specs} == set(LAYERS.values())
    assert all(2 <= times.layers_of(spec) <= 16 for spec in specs)


def test_a_part_that_takes_too_long_is_ended_and_the_rest_goes_on(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    sleeping = ("sh", "-c", f"sleep 60 > '{pipe}' & wait")
    fine = (sys.executable, "-c", "import multilora_kernels")
    monkeypatch.setattr(
        run,
        "parts",
        lambda folder, rehearsal: [
            run.Part("slow", sleeping, 0.01),
            run.Part("fine", fine, 1.0),
            run.Part("lacking", fine, 1.0, program="no_such_program"),
        ],
    )
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(run, "_GRACE_S", 0.0)
    found = run.run(tmp_path, 20.0, None)["parts"]
    assert found["slow"]["code"] == "too late"
    assert found["fine"]["code"] == 0
    assert found["lacking"] == {"left_out": "there is no program no_such_program"}
    poller = select.poll()
    poller.register(held, select.POLLHUP)
    assert poller.poll(10_000), "what the part has started goes on beside the next one"
    os.close(held)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it looks for a card")
@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 1), (run.TOO_LATE, 0)])
def test_a_part_fails_by_its_code_and_not_by_the_clock(tmp_path, monkeypatch, code, expected):
    summary = {"parts": {"fine": {"code": 0}, "left": {"left_out": "why"}, "own": {"code": code}}}
    monkeypatch.setattr(run, "run", lambda *_, **__: summary)
    assert run.main([str(tmp_path / "results"), "--rehearse"]) == expected


def test_whoever_ends_it_ends_the_part_that_runs(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    program = (
        "import sys; from tools.gpu import run\n"
        "run.parts = lambda folder, rehearsal: [run.Part('slow', ('sh', '-c', sys.argv[2]), 1.0)]\n"
        "sys.exit(run.main([sys.argv[1], '--rehearse']))"
    )
    part = f"exec > '{pipe}'; echo begun; sleep 60"
    command = [sys.executable, "-c", program, str(tmp_path / "results"), part]
    process = subprocess.Popen(command, cwd=ROOT, env=bare())
    poller = select.poll()
    poller.register(held, select.POLLIN)
    assert poller.poll(60_000)
    assert os.read(held, 6) == b"begun\n"
    process.terminate()
    assert process.wait(30) == 128 + 15
    assert poller.poll(10_000) == [(held, select.POLLHUP)]
    os.close(held)
