"""The demo's parts that need no engine: its processes, its command line, what it prints."""

import importlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEMO = Path(__file__).parents[3] / "examples" / "demo"
PYTHON = [sys.executable, "-c"]
READY = "import sys; print('ready', flush=True); "
SLEEP = "import time; time.sleep(60)"
NOBODY_LISTENS = "http://127.0.0.1:9"


class Demo:
    """The demo's modules, by name."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(name)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Demo:
    """The demo's modules; their log files go to the test's folder."""
    monkeypatch.syspath_prepend(DEMO)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Demo()


@pytest.fixture
def children(demo: Demo) -> Iterator[Any]:
    """Starts children that end with the test: `children(name, code)`."""
    with ExitStack() as stack:
        yield lambda name, code: stack.enter_context(
            demo.processes.started(name, [*PYTHON, code], stdin=subprocess.PIPE)
        )


def group_exists(process: subprocess.Popen) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_error_stops_the_process_and_keeps_its_log(demo: Demo) -> None:
    def interrupted() -> None:
        with demo.processes.started("sleeper", [*PYTHON, SLEEP]) as child:
            seen.append(child)
            raise KeyboardInterrupt

    seen: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not group_exists(seen[0].process)
    assert seen[0].log.exists()


def test_a_process_that_does_not_heed_the_signal_is_killed_with_its_children(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.processes, "_STOP_LIMIT_S", 0.2)
    stubborn = (
        "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "subprocess.Popen(['sleep', '60']); "
    )
    options = {"stdout": subprocess.PIPE}
    with demo.processes.started("stubborn", [*PYTHON, stubborn + READY + SLEEP], **options) as it:
        assert it.process.stdout.readline() == "ready\n"
    assert it.process.returncode == -9
    # The pipe ends when its last writer does.
    assert select.select([it.process.stdout], [], [], 5)[0]
    assert not it.process.stdout.read()


@pytest.mark.parametrize("dying", ["server", "other"])
def test_the_demo_ends_with_the_log_of_a_process_that_dies(
    demo: Demo, children: Any, monkeypatch: pytest.MonkeyPatch, dying: str
) -> None:
    monkeypatch.setattr(demo.demo, "START_LIMIT_S", 10)
    codes = {"server": SLEEP, "other": SLEEP} | {dying: "raise ValueError('no memory')"}
    server, other = (children(name, code) for name, code in codes.items())
    with pytest.raises(
        SystemExit, match=rf"(?s)^{dying} ended with status 1;.*ValueError: no memory"
    ):
        demo.demo.wait_until_ready(NOBODY_LISTENS, server, [other])


def test_the_demo_tells_how_long_it_waits_and_gives_up(
    demo: Demo,
    children: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(demo.demo, "PROGRESS_S", 0.1)
    monkeypatch.setattr(demo.demo, "START_LIMIT_S", 0.4)
    with pytest.raises(SystemExit, match=r"^server was not ready after"):
        demo.demo.wait_until_ready(NOBODY_LISTENS, children("server", SLEEP), [])
    assert "  ... starting, 0 s\n" in capsys.readouterr().out


def test_the_demo_starts_no_engine_to_say_what_it_is() -> None:
    command = [sys.executable, str(DEMO / "demo.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "The demo: four customers' adapters" in done.stdout
    assert "Environment" not in done.stdout


def test_the_server_has_room_for_every_adapter(demo: Demo) -> None:
    command = demo.demo.serve_command(Path("/model"), 8000)
    options = dict(pairwise(command))
    modules = [json.loads(text) for text in command[command.index("--lora-modules") + 1 :]]
    assert {module["name"] for module in modules} == {
        path.name for path in demo.prompts.ADAPTERS.iterdir()
    }
    configs = [json.loads((Path(m["path"]) / "adapter_config.json").read_text()) for m in modules]
    assert int(options["--max-loras"]) == len(modules)
    assert int(options["--max-lora-rank"]) == max(config["r"] for config in configs)
