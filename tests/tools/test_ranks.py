"""The README's table of the expand kernel is the compiler's, and only what is known spills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tools.kernels.measure.tuned.launch_cases import table_name
from tools.kernels.ranks import ARCHITECTURES, MAX_RANKS, rows_in_page

ROOT = Path(__file__).parents[2]
FAST = "90", (16, 64)
SPILLED = {("sm_90", 320)}  # 8 bytes, with 64 tokens


def made(architecture: str, max_ranks: tuple[int, ...]) -> list[str]:
    """Cells of a process of its own: this one may have Triton in interpreter mode."""
    code = (
        "from tools.kernels.ranks import cell\n"
        f"for rank in {max_ranks}: print(cell({architecture!r}, rank)[0])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def shown(architecture: str) -> dict[int, str]:
    cells = rows_in_page().get((triton.__version__, table_name(architecture)))
    if cells is None:
        pytest.skip(f"the table has no row of Triton {triton.__version__}")
    return dict(zip(MAX_RANKS, cells, strict=True))


def test_a_part_of_the_table_is_what_the_compiler_makes():
    architecture, max_ranks = FAST
    expected = [shown(architecture)[rank] for rank in max_ranks]
    assert made(architecture, max_ranks) == expected


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_table_is_what_the_compiler_makes(architecture):
    assert made(architecture, MAX_RANKS) == list(shown(architecture).values())


def test_nothing_in_the_table_spills_but_what_is_known():
    found = {
        (card, rank)
        for (_, card), cells in rows_in_page().items()
        for rank, cell in zip(MAX_RANKS, cells, strict=True)
        if "spilled" in cell
    }
    assert found == SPILLED
