"""What is said to be checked with a vLLM is what tests have shown there."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from tools.testbed import compatibility
from tools.testbed.results import SEAM_TABLES, checked, load, with_checked
from vllm_multilora.integration.patching.patch import RUNS
from vllm_multilora.integration.patching.tables.ledger import PATCHES

ROOT = Path(__file__).parents[2]
RESULTS = load()


def test_the_results_are_of_runs_without_failures():
    assert RESULTS
    assert set(RESULTS) <= set(RUNS)
    assert not {run: result.failed for run, result in RESULTS.items() if result.failed}


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_an_entry_of_the_ledger_names_the_runs_that_called_it(patch):
    assert patch.checked == checked(patch.name, RESULTS)


def test_a_run_writes_what_it_has_called_into_the_ledger():
    emptied = 0
    for file in SEAM_TABLES:
        table = file.read_text()
        assert with_checked(table, RESULTS) == table
        nothing = with_checked(table, {})
        emptied += nothing.count("checked=()")
        assert with_checked(nothing, RESULTS) == table
    assert emptied == len(PATCHES)


def test_the_page_is_up_to_date():
    assert compatibility.FILE.read_text() == compatibility.page(RESULTS), (
        "run python -m tools.testbed.compatibility"
    )


def marked_features() -> set[str]:
    """What the tests' marks say they cover."""
    found = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.smoke":
                found |= {ast.literal_eval(argument) for argument in node.args}
    return found


def test_every_feature_of_a_test_has_a_row_and_every_other_row_says_why_not():
    rows = {row.feature: row for row in compatibility.ROWS}
    features = marked_features()
    assert features <= set(rows)
    untested = [row for name, row in rows.items() if name not in features]
    assert all(row.untested and row.note for row in untested)


def test_the_recorder_notes_a_first_call_where_the_runner_looks(tmp_path, monkeypatch):
    recorder = ROOT / "tools/testbed/recorder/multilora_testbed_recorder.py"
    spec = importlib.util.spec_from_file_location("recorder", recorder)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from vllm_multilora.integration.patching.patch import Patch

    runner = (ROOT / "tools/testbed/__main__.py").read_text()
    assert re.search(r'_CALLED = "(\w+)"', runner)[1] == module.FOLDER_VARIABLE
    monkeypatch.setattr(Patch, "load_handler", Patch.load_handler)
    monkeypatch.setenv(module.FOLDER_VARIABLE, str(tmp_path))
    for _ in range(2):
        module.start()
    patch = Patch("a-patch", "m:f", "path:join", "why", "never", package="os")
    assert patch.load_handler() is __import__("os.path").path.join
    assert [file.name for file in tmp_path.iterdir()] == ["a-patch"]
