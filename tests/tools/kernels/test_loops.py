"""The page's table of main loops is the compiler's and the model's, and no loop got longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.kernels.loops import PAGE, in_page, rows_of
from tools.kernels.modelled.ours import EXPAND_STEP, SHRINK_STEP

ROOT = Path(__file__).parents[3]
WIDE = "8b.gate_up"

# (server's highest rank, adapter's rank): instructions and static cycles of a column of y, at most.
# What a scratch copy took with planes summed before the loop, no mask on B and wide blocks, a pass
# of one step (sm_90, Triton 3.6.0). For other ranks in a server of 256, and for cycles above rank
# 64, what the kernel took before that (3.9.0; its inner loop alone, a pass for each 64 ranks).
MAX_PER_COLUMN = {
    (16, 16): (79 / 64, 1.95),
    (32, 32): (199 / 128, 2.45),
    (64, 64): (111 / 64, 325 / 64),
    (64, 32): (144 / 128, 334 / 128),
    (64, 16): (112 / 128, 246 / 128),
    (256, 256): (313 / 64, 3 * 739 / 64),
    (256, 128): (164 / 64, 739 / 64),
    (256, 32): (200 / 128, 466 / 128),
    (256, 16): (139 / 128, 310 / 128),
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


@pytest.mark.slow
def test_the_page_shows_the_main_loops_that_the_compiler_makes(made):
    assert made == shown()


def expand_loops() -> dict[tuple[int, int], dict[int, tuple[float, float]]]:
    """By ranks as in `MAX_PER_COLUMN`, then by steps: what a column takes."""
    found: dict = {}
    for layer, kernel, row in rows_of(shown()):
        if (layer, kernel) == (WIDE, "expand"):
            ranks = row["server's highest rank"], row["adapter's rank up to"]
            counts = row["instructions"] / row["columns"], row["static cycles"] / row["columns"]
            found.setdefault(ranks, {})[row["steps"]] = counts
    return found


def test_passes_of_the_expand_kernel_stay_within_their_limits():
    found = expand_loops()
    assert found.keys() >= MAX_PER_COLUMN.keys()
    for ranks, (instructions, cycles) in MAX_PER_COLUMN.items():
        for steps, counts in found[ranks].items():
            assert counts[0] <= instructions, (ranks, steps)
            assert counts[1] <= cycles, (ranks, steps)


def test_a_last_single_step_stands_behind_passes_of_two():
    steps = {ranks: list(loops) for ranks, loops in expand_loops().items()}
    of_two = {ranks for ranks in steps if ranks[0] in (16, 64)}
    assert of_two == {(16, 16), (64, 64), (64, 32), (64, 16)}
    assert steps == {ranks: [2, 1] if ranks in of_two else [1] for ranks in steps}


def test_the_model_counts_the_steps_that_the_page_shows():
    found: dict = {"shrink": {}, "expand": {}}
    for _, kernel, row in rows_of(shown()):
        if row["adapter's rank up to"] > 64:
            continue  # several blocks of ranks
        steps = row["steps"]
        key = row["adapter's rank up to"], row["columns"] // steps
        counts = row["instructions"] / steps, row["static cycles"] / steps
        found[kernel].setdefault(row["server's highest rank"], {}).setdefault(key, counts)
    assert found == {"shrink": SHRINK_STEP, "expand": EXPAND_STEP}
