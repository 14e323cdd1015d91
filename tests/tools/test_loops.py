"""The page's table of main loops is the compiler's, and no loop is longer than it has been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.kernels.loops import PAGE, in_page

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# (server's highest rank, adapter's rank): instructions and static cycles that a step of the
# expand kernel had, at as many columns, before its sums of planes and masks left the loop.
BEFORE = {
    (16, 16): (152, 380),  # two steps of 64 columns
    (64, 64): (162, 410),
    (64, 32): (214, 490),
    (64, 16): (146, 317),
    (256, 256): (1098, None),
    (256, 128): (476, None),
}


@pytest.fixture(scope="module")
def made() -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernels.loops"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_page_shows_the_main_loops_that_the_compiler_makes(made):
    shown = in_page(PAGE.read_text(encoding="utf-8"))
    if made.splitlines()[0] != shown.splitlines()[0]:
        pytest.skip(f"the page has another compiler's: {shown.splitlines()[0]}")
    assert made == shown


def test_no_step_of_the_expand_kernel_is_as_long_as_before(made):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines()[4:]]
    found = {
        (int(row[0]), int(row[1])): (int(row[4]), int(row[5])) for row in rows if row[2] == "expand"
    }
    assert found.keys() >= BEFORE.keys()
    for ranks, (instructions, cycles) in BEFORE.items():
        assert found[ranks][0] < instructions, ranks
        assert cycles is None or found[ranks][1] < cycles, ranks
