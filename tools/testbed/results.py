"""What the smoke tests have shown, by vLLM version and model runner: `results.json`, committed.

A run is named by its version, such as `0.33`, and with the second model runner `0.33/2`. Its entry
holds the tests by outcome, each feature's outcome, and the entries of the ledger that were called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_multilora.integration.patching.patch import RUNS

FILE = Path(__file__).parent / "results.json"
_PATCHING = Path(__file__).parents[2] / "vllm_multilora/integration/patching/tables"
SEAM_TABLES = (_PATCHING / "core_seams.py", _PATCHING / "gateway_seams.py")


@dataclass(frozen=True)
class Result:
    """What became of one run.

    Attributes:
        vllm: The exact version.
        tests: How many tests passed.
        failed: The tests that did not.
        features: By feature, `passed`, `failed`, or `skipped` if no test of it ran.
        called: The entries of the ledger that were called, by name.
    """

    vllm: str
    tests: int
    failed: tuple[str, ...]
    features: Mapping[str, str]
    called: tuple[str, ...]

    @classmethod
    def of(cls, vllm: str, outcomes: Mapping[str, Any], called: Iterable[str]) -> Result:
        """Puts together what `tools.testbed.outcomes` and the recorder have written."""
        by_feature: dict[str, set[str]] = {}
        for test in outcomes.values():
            for feature in test["features"]:
                by_feature.setdefault(feature, set()).add(test["outcome"])
        worst = ("failed", "passed", "skipped")
        return cls(
            vllm,
            sum(test["outcome"] == "passed" for test in outcomes.values()),
            tuple(sorted(n for n, test in outcomes.items() if test["outcome"] == "failed")),
            {f: next(o for o in worst if o in seen) for f, seen in sorted(by_feature.items())},
            tuple(sorted(called)),
        )


def load() -> dict[str, Result]:
    """The results of all runs that there have been, by their names."""
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    return {
        name: Result(
            each["vllm"],
            each["tests"],
            tuple(each["failed"]),
            each["features"],
            tuple(each["called"]),
        )
        for name, each in found.items()
    }


def keep(run: str, result: Result) -> None:
    """Puts a run's result in the place of its last one."""
    results = load() | {run: result}
    ordered = {name: asdict(results[name]) for name in RUNS if name in results}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n")


def checked(patch: str, results: Mapping[str, Result]) -> tuple[str, ...]:
    """The runs that have called an entry of the ledger: what its `checked` has to say."""
    return tuple(name for name in RUNS if name in results and patch in results[name].called)


def with_checked(table: str, results: Mapping[str, Result]) -> str:
    """The text of a part of the ledger, each entry's `checked` being what the results say.

    An entry that all runs have called has none: that is the default.
    """

    def entry(found: re.Match[str]) -> str:
        runs = checked(found["name"], results)
        listed = ", ".join(f'"{run}"' for run in runs) + ("," if len(runs) == 1 else "")
        said = "" if runs == RUNS else f"{found['indent']}checked=({listed}),\n"
        return f"{found['before']}{said}{found['until']}"

    return _ENTRY.sub(entry, table)


_ENTRY = re.compile(
    r'(?P<before>name="(?P<name>[^"]+)".*?\n)(?: +checked=\([^)]*\),\n)?'
    r"(?P<until>(?P<indent> +)until=)",
    re.DOTALL,
)
