"""The notebook as its reader runs it, cell by cell, over tiny checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..engine import store_folder
from ..models.cases import Scenario

pytestmark = [pytest.mark.serving, pytest.mark.slow]

NOTEBOOK = Path(__file__).parents[3] / "examples/notebook/multilora.ipynb"
NAMES = ("all-linear-r8", "qv-r5", "rslora-r16")


def code_of(notebook: Path) -> str:
    """The notebook's code as one program; what a cell would show is not shown."""
    cells = json.loads(notebook.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_the_notebook_does_what_it_says(llama: Scenario, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    for name in NAMES:
        (adapters / name).symlink_to(llama.adapters[name])
    with store_folder() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code_of(NOTEBOOK)],
            cwd=NOTEBOOK.parent,
            env={
                **os.environ,
                "MODEL": str(llama.base),
                "ADAPTERS": str(adapters),
                "MULTILORA_STORE_FOLDER": folder,
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if ": " in line]
    said = dict(line.split(": ", 1) for line in reversed(lines))  # what comes first counts
    answers = [said[name] for name in ("base model", *NAMES)]
    assert len(set(answers)) > 1
    assert said["nobody"].startswith("error: ")
    assert "/no/such/folder" in said["nobody"]
    assert said["16 requests"].startswith("base model ")
