"""Counts what the plugin changes in vLLM and how long its rooms are; `python -m tools.seams`.

`seams.json` keeps the numbers: those of seams as they are, and the most lines that a room may have.
A test lets them only fall; `python -m tools.seams --lower` writes what has fallen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from vllm_multilora.integration.patching.parts import part_of
from vllm_multilora.integration.patching.tables.attributes import (
    CORE_ATTRIBUTES,
    GATEWAY_ATTRIBUTES,
    TOOL_ATTRIBUTES,
)
from vllm_multilora.integration.patching.tables.core_seams import CORE_SEAMS
from vllm_multilora.integration.patching.tables.gateway_seams import GATEWAY_SEAMS
from vllm_multilora.integration.patching.tables.overrides import OVERRIDES
from vllm_multilora.integration.patching.tables.replaced import REPLACED

FILE = Path(__file__).parent / "seams.json"
_ROOT = Path(__file__).parents[1]
_STEP = 500
"""Lines by which the most lines of a room fall."""
_SUFFIXES = {".py", ".c", ".h"}


def seams() -> dict[str, int]:
    """How many seams of each kind there are."""
    return {
        "patches, core": len(CORE_SEAMS.patches),
        "patches, gateway": len(GATEWAY_SEAMS.patches),
        "methods overridden or called": sum(map(len, OVERRIDES.values())),
        "replaced outside the ledger": len(REPLACED),
        "private attributes read": len((*CORE_ATTRIBUTES, *GATEWAY_ATTRIBUTES, *TOOL_ATTRIBUTES)),
    }


def lines() -> dict[str, int]:
    """How many lines of code each room has, comments and blank lines included.

    Experts and sources have rooms of their own: folders of that name, wherever they are.
    """
    kernels, experts = (_lines_below(_ROOT / folder) for folder in ("kernels", "kernels/experts"))
    found = {"kernels": kernels - experts, "core": 0, "gateway": 0, "tools": 0}
    found |= {"experts": experts, "sources": 0}
    package = _ROOT / "vllm_multilora"
    for file in package.rglob("*.py"):
        parts = file.relative_to(package).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        own = next((room for room in ("experts", "sources") if room in parts[:-1]), None)
        room = own or part_of(f"vllm_multilora.{module}").name
        found[room] += _lines_in(file)
    return {f"lines, {room}": count for room, count in found.items()}


def kept() -> dict[str, int]:
    """The numbers in `seams.json`."""
    found: dict[str, int] = json.loads(FILE.read_text())
    return found


def lowered(before: Mapping[str, int]) -> dict[str, int]:
    """The numbers that `seams.json` should have: none is higher than before."""
    now = {**seams(), **{room: -(-count // _STEP) * _STEP for room, count in lines().items()}}
    return {name: min(count, before.get(name, count)) for name, count in now.items()}


def _lines_below(folder: Path) -> int:
    return sum(_lines_in(file) for file in folder.rglob("*") if file.suffix in _SUFFIXES)


def _lines_in(file: Path) -> int:
    return file.read_text().count("\n")


def main() -> int:
    """Prints the numbers; returns 1 if one is higher than `seams.json` allows."""
    parser = argparse.ArgumentParser(prog="python -m tools.seams")
    parser.add_argument("--lower", action="store_true", help="write the numbers that have fallen")
    before = kept()
    if parser.parse_args().lower:
        FILE.write_text(json.dumps(lowered(before), indent=1) + "\n")
    for name, count in {**seams(), **lines()}.items():
        mark = "" if count <= before.get(name, count) else f"  above the {before[name]} kept"
        print(f"{name:30} {count:6}{mark}")
    return int(any(c > before.get(n, c) for n, c in {**seams(), **lines()}.items()))


if __name__ == "__main__":
    sys.exit(main())
