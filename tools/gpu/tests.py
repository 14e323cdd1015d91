"""Runs the kernels' tests on a card, the most telling ones first, in several processes.

    python -m tools.gpu.tests [--out FOLDER] [--processes 8] [--collect-only]

Each test compiles kernels of its own, which takes longer than it runs. So the tests are dealt out
to processes, which share the card. FOLDER gets a file in JUnit's format and the output of each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "kernels"
TESTS = (
    "triton/test_triton.py",
    "triton/test_triton_bits.py",
    "triton/test_graph_capture.py",
    "triton/test_triton_replay.py",
    "triton/test_prepared_launches.py",
    "packs/test_scatter.py",
    "test_output_factors.py",
)
"""By what they tell: right values, the same bits, graphs, launches, slots, factors."""

MAX_PROCESSES = 8
"""Each takes about half a gibibyte of the card's memory for its CUDA context alone."""

PART = "GPU_TESTS_PART"
"""Variable with the number of a process and how many there are, as `0/8`."""

_NO_TESTS = 5  # pytest's code where there is nothing to run


def command(*arguments: str) -> list[str]:
    """How pytest is called for all tests, by `tools.gpu.tests_part` with those of one process."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = [str(FOLDER / name) for name in TESTS]
    return [*pytest, "-p", "tools.gpu.tests_part", *arguments, *files]


def main(arguments: list[str] | None = None) -> int:
    """Runs all; the first code of pytest's that says that something failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.tests")
    parser.add_argument("--out", type=Path, help="folder for results")
    parser.add_argument(
        "--processes", type=int, default=min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
    )
    parser.add_argument("--collect-only", action="store_true", help="run no test")
    chosen = parser.parse_args(arguments)
    if chosen.collect_only:
        return subprocess.run(command("--collect-only"), cwd=ROOT).returncode
    codes = []
    with ExitStack() as stack:
        running = []
        for number in range(chosen.processes):
            report, output = [], None
            if chosen.out:
                report = [f"--junitxml={chosen.out / f'tests-{number}.xml'}"]
                log = chosen.out / f"tests-{number}.log"
                output = stack.enter_context(log.open("wb"))
            process = subprocess.Popen(
                command(*report),
                cwd=ROOT,
                env={**os.environ, PART: f"{number}/{chosen.processes}"},
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
            )
            running.append(process)
        for number, process in enumerate(running):
            while True:
                # An interrupt reaches all of them: each writes down what it has run, and ends.
                with suppress(KeyboardInterrupt):
                    codes.append(process.wait())
                    break
            print(f"process {number}: pytest's code {codes[-1]}", flush=True)
    return next((code for code in codes if code not in (0, _NO_TESTS)), 0)


if __name__ == "__main__":
    sys.exit(main())
