"""A plugin of pytest's that writes what became of the smoke tests, for `tools.testbed.results`."""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

_FILE = pytest.StashKey[Path]()
_OUTCOMES = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="write the tests' outcomes to this file")
    parser.addoption("--passed", type=Path, help="leave tests out that passed, by such a file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OUTCOMES] = defaultdict(lambda: {"outcome": "passed", "features": []})
    _note_called_patches()
    config.pluginmanager.register(_Collector(config), "testbed-outcomes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.getoption("--passed")
    if file is None:
        return
    before = json.loads(file.read_text())
    passed = {name for name, test in before.items() if test["outcome"] == "passed"}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


def _note_called_patches() -> None:
    """As the recorder does in vLLM's processes, for tests that call vLLM's functions themselves."""
    recorder: Any = importlib.import_module("multilora_testbed_recorder")
    recorder.start()


class _Collector:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        features = {each for mark in item.iter_markers("smoke") for each in mark.args}
        # Reaches the process that collects the reports, if tests run in others.
        item.user_properties.append(("features", sorted(features)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._config.stash[_OUTCOMES][report.nodeid]
        test["features"] = dict(report.user_properties).get("features", [])
        if report.failed or (report.skipped and test["outcome"] == "passed"):
            test["outcome"] = "failed" if report.failed else "skipped"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        file = self._config.getoption("--outcomes")
        if file is not None and not hasattr(self._config, "workerinput"):
            file.write_text(json.dumps(self._config.stash[_OUTCOMES]))
