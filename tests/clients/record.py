"""What each client has shown: `record.json`, which every run of these tests brings up to date.

`python -m tools.pages` makes the table of docs/clients.md from it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).with_name("record.json")

Tests = dict[str, dict[str, str]]
"""By the test's name: client, version, and what it proves."""


class Recorder:
    """Collects what became of the tests of one run."""

    def __init__(self) -> None:
        self._passed: Tests = {}
        self._failed: set[str] = set()

    def hear(self, report: pytest.TestReport) -> None:
        """Notes a report of a test's phase.

        Raises:
            KeyError: The test has passed, and does not say what of which client it shows.
        """
        test = report.nodeid.rpartition("/")[2]
        if report.failed:
            self._failed.add(test)
        elif report.when == "call" and report.passed:
            noted = dict(report.user_properties)
            self._passed[test] = {key: str(noted[key]) for key in ("client", "version", "proves")}

    def updated(self, record: Mapping[str, Any], vllm: str) -> dict[str, Any]:
        """A record after this run: tests that have passed join it, those that have failed leave.

        Args:
            record: The record before.
            vllm: The version of vLLM. With another one, nothing of the record before is kept.
        """
        kept = record["tests"] if record.get("vllm") == vllm else {}
        tests = {**kept, **self._passed}
        return {
            "vllm": vllm,
            "tests": {test: tests[test] for test in sorted(tests) if test not in self._failed},
        }

    def write(self, vllm: str) -> None:
        """Brings the file up to date, unless no test has ended."""
        if self._passed or self._failed:
            before = json.loads(FILE.read_text()) if FILE.exists() else {}
            FILE.write_text(json.dumps(self.updated(before, vllm), indent=1) + "\n")
