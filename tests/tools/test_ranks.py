"""The README's table of the expand kernel is the compiler's, and nothing in it spills."""

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
VERSIONS = "3.6.0", "3.9.0"  # of Triton: the ends of the range in pyproject.toml


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


def test_nothing_in_the_table_spills():
    found = rows_in_page()
    assert {(version, card) for version, card in found} >= {
        (version, table_name(architecture))
        for version in VERSIONS
        for architecture in ARCHITECTURES
    }
    assert not [key for key, cells in found.items() if any("spilled" in each for each in cells)]
