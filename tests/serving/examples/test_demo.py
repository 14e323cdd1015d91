"""The demo as a user runs it: all of its parts, and nothing of it left running."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.serving, pytest.mark.slow]

DEMO = Path(__file__).parents[3] / "examples" / "demo"
LIMIT_S = 300
# The store stays for two seconds after its last server, in case another comes.
ENDED_S = 30
MARK = "MULTILORA_DEMO_TEST"


def left_running(mark: str) -> list[str]:
    """The processes that inherited the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process.name())
        except psutil.Error:  # It has ended, or is another user's.
            continue
    return found


def end_in_time(mark: str) -> bool:
    deadline = time.monotonic() + ENDED_S
    while left_running(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short path, unlike pytest's: the engines' sockets lie in it, and theirs are limited."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        yield Path(folder)


def test_the_demo_shows_all_its_parts_and_leaves_nothing_running(temporary: Path) -> None:
    mark = f"run-{os.getpid()}"
    # What this process's other tests need of vLLM is nothing that a user's shell has.
    mine = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    # Building the base model, which the first run does, shows transformers' progress.
    build = [sys.executable, str(DEMO / "base_model.py")]
    subprocess.run(build, env=mine, timeout=LIMIT_S, check=True)
    run = subprocess.run(
        [sys.executable, str(DEMO / "demo.py")],
        env=mine | {MARK: mark, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.findall(r"^(\d)\. ", run.stdout, re.MULTILINE) == ["1", "2", "3", "4"]
    for adapter in (path.name for path in (DEMO / "adapters").iterdir()):
        assert run.stdout.count(f"adapter: {adapter}\n") == 2
    assert re.findall(r"^  (.+?)  +[\d.]+ s +[\d.]+ tokens/s$", run.stdout, re.MULTILINE) == [
        "base model alone",
        "plugin, mixed adapters",
        "stock vLLM, mixed adapters",
    ]
    assert "grows with the prompts and with --max-lora-rank: 28 times" in run.stdout
    assert run.stdout.index("server stopped") < run.stdout.index("3. ") < run.stdout.index("Done")
    assert not run.stderr
    assert end_in_time(mark), left_running(mark)
    assert not list(temporary.glob("*.log"))
