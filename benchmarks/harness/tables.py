"""Figures as Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.harness.registry import Figure


def table(figures: Sequence[Figure]) -> str:
    """A row for each case and a column for each measure; medians, least and most of all rounds."""
    found = {(figure.case, figure.measure): figure for figure in figures}
    rows = list(dict.fromkeys(figure.case for figure in figures))
    columns = list(dict.fromkeys(figure.measure for figure in figures))
    if rows == [""]:
        lines = ["| | median | rounds |", "|---|---|---|"]
        for figure in figures:
            lines.append(f"| {figure.measure} | {cell(figure.values)} | {len(figure.values)} |")
        return "\n".join(lines)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [
            cell(found[row, column].values) if (row, column) in found else "" for column in columns
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: Sequence[float]) -> str:
    """A median, and in brackets the least and the most where they differ from it."""
    middle, least, most = (
        number(value) for value in (statistics.median(values), min(values), max(values))
    )
    return middle if least == most else f"{middle} ({least} to {most})"


def number(value: float) -> str:
    """Three digits, and all of a larger number; `inf` for what never came."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.3f}"
