"""Tables for terminals."""

from __future__ import annotations

import unicodedata
from collections.abc import Container, Sequence


def width_of(text: str) -> int:
    """Columns that a text takes on a terminal: a wide letter two, an accent of its own none."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )


def cut(text: str, width: int) -> str:
    """The beginning of a text that is no wider."""
    text = text[:width]
    while width_of(text) > width:
        text = text[:-1]
    return text


def aligned(rows: Sequence[Sequence[str]], *, right: Container[int] = ()) -> list[str]:
    """Lines with columns as wide as their widest cells; those numbered in `right` end alike."""
    widths = [max(map(width_of, column)) for column in zip(*rows, strict=True)]

    def padded(column: int, cell: str) -> str:
        space = " " * (widths[column] - width_of(cell))
        return space + cell if column in right else cell + space

    return ["  ".join(padded(*item) for item in enumerate(row)).rstrip() for row in rows]
