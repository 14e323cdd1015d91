"""The page's table of main loops is the compiler's, and no loop is longer than it has been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.kernels.loops import PAGE, in_page

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# (server's highest rank, adapter's rank): instructions and static cycles of a step of the expand
# kernel, at as many columns, before its sums of planes and masks left the loop (sm_90, Triton
# 3.9.0). Above rank 64 its inner loop alone counts, one pass for each 64 ranks after the first.
BEFORE = {
    (16, 16): (2 * 79, 2 * 185),  # two steps of 64 columns
    (64, 64): (146, 373),
    (64, 32): (199, 466),
    (64, 16): (137, 310),
    (256, 256): (3 * 312, 3 * 739),
    (256, 128): (312, 739),
    (256, 32): (200, 466),
    (256, 16): (139, 310),
}


def shown() -> str:
    return in_page(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made() -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernels.loops"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout.strip()
    if table.splitlines()[0] != shown().splitlines()[0]:
        pytest.skip(f"the page has another compiler's: {shown().splitlines()[0]}")
    return table


def test_the_page_shows_the_main_loops_that_the_compiler_makes(made):
    assert made == shown()


def test_no_step_of_the_expand_kernel_is_as_long_as_before(made):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines()[4:]]
    found = {
        (int(row[0]), int(row[1])): (int(row[4]), int(row[5])) for row in rows if row[2] == "expand"
    }
    assert found.keys() >= BEFORE.keys()
    for ranks, (instructions, cycles) in BEFORE.items():
        assert found[ranks][0] < instructions, ranks
        assert found[ranks][1] < cycles, ranks
