"""The table of clients is that of the tests there are, and says only what has passed."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.clients import record
from tests.clients.record import Recorder

TESTS = Path(record.__file__).parent


def marked() -> set[tuple[str, str]]:
    """Every test of clients, and what it is marked as proving."""
    found = set()
    for file in TESTS.glob("test_*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if not isinstance(function, ast.FunctionDef) or not function.name.startswith("test_"):
                continue
            marks = [each for each in function.decorator_list if "proves" in ast.dump(each)]
            assert len(marks) == 1, f"{file.name}: {function.name} needs one mark `proves`"
            assert isinstance(marks[0], ast.Call)
            found.add((f"{file.name}::{function.name}", ast.literal_eval(marks[0].args[0])))
    return found


def test_the_record_has_every_test_as_it_is_now() -> None:
    tests = json.loads(record.FILE.read_text())["tests"]
    recorded = {(name.partition("[")[0], test["proves"]) for name, test in tests.items()}
    assert recorded == marked(), "run make test-clients and python -m tools.pages"


def report(test: str, outcome: str, **properties: str) -> Any:
    return SimpleNamespace(
        nodeid=f"tests/clients/{test}",
        when="call",
        user_properties=list(properties.items()),
        passed=outcome == "passed",
        failed=outcome == "failed",
    )


SHOWN = {"client": "a client", "version": "2", "proves": "answers"}
BEFORE = {
    "vllm": "0.32.0",
    "tests": {name: {**SHOWN, "version": "1"} for name in ("passes", "fails", "is left out")},
}


def test_a_run_changes_what_it_has_tried_and_nothing_else() -> None:
    recorder = Recorder()
    recorder.hear(report("passes", "passed", **SHOWN))
    recorder.hear(report("fails", "failed"))
    recorder.hear(report("is left out", "skipped"))
    assert recorder.updated(BEFORE, "0.32.0")["tests"] == {
        "passes": SHOWN,
        "is left out": BEFORE["tests"]["is left out"],
    }


def test_a_run_with_another_vllm_begins_the_record_anew() -> None:
    recorder = Recorder()
    recorder.hear(report("passes", "passed", **SHOWN))
    assert recorder.updated(BEFORE, "0.33.0") == {"vllm": "0.33.0", "tests": {"passes": SHOWN}}


def test_a_test_that_names_no_client_is_an_error() -> None:
    with pytest.raises(KeyError, match="client"):
        Recorder().hear(report("passes", "passed", proves="answers"))
