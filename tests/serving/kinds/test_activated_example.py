"""The example of an activated adapter as a user runs it: trained, served, and sharing a context."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.serving, pytest.mark.slow]

EXAMPLE = Path(__file__).parents[3] / "examples" / "activated"
LIMIT_S = 300


def run(script: str, *arguments: object) -> str:
    # What this process's other tests need of vLLM is nothing that a user's shell has.
    mine = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / script), *map(str, arguments)],
        env=mine,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_adapter_is_trained_and_shares_contexts_both_ways(tmp_path: Path) -> None:
    """With half of the training: enough for the form of its answers."""
    adapter = tmp_path / "ticket"
    losses = re.findall(r"loss ([\d.]+)", run("train.py", "--output", adapter, "--epochs", 2))
    assert float(losses[-1]) < 0.6 * float(losses[0])
    printed = run("shared_context.py", "--adapter", adapter)
    assert printed.count(" ticket: Team: ") == 2
    cached = re.findall(r"\((\d+) prompt tokens, (\d+) cached\)", printed)
    whole = [int(tokens) // 32 * 32 for tokens, _ in cached]
    assert len(cached) == 4
    assert int(cached[1][1]) >= whole[1] - 32
    assert int(cached[3][1]) >= whole[3] - 32
