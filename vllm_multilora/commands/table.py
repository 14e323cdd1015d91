"""Tables for terminals."""

from __future__ import annotations

from collections.abc import Container, Sequence


def counted(count: int, what: str) -> str:
    """A number of things in words, such as `1 adapter` or `2 adapters`."""
    return f"{count} {what}{'s' * (count != 1)}"


def aligned(rows: Sequence[Sequence[str]], *, right: Container[int] = ()) -> list[str]:
    """Lines in which every column is as wide as its widest cell.

    Args:
        rows: Cells, as many in each row.
        right: Numbers of the columns whose cells stand at their right edge.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
