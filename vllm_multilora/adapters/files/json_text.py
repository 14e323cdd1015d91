"""Parses untrusted JSON in bounded time and memory.

Python turns two characters, `[]`, into a list of 64 bytes, and two more into a number of 24. So
what a text would become is counted before it is parsed. Nothing else needs a bound: nesting ends at
Python's recursion limit, and numbers at its limit of digits.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from vllm_multilora.adapters.problems import shown


class JsonTooLargeError(ValueError):
    """A text would become more than is taken.

    Attributes:
        found: What it has, in words.
        most: How many of these are taken.
    """

    def __init__(self, found: str, most: int) -> None:
        super().__init__(f"it has {found}, and at most {most} are taken")
        self.found = found
        self.most = most


def parse_json(text: bytes, *, parts: int, values: int, unique: bool = False) -> Any:
    """Parses a text.

    Args:
        text: All of it, in UTF-8.
        parts: How many opening brackets and braces it may have, those in strings included.
        values: How many commas it may have, likewise.
        unique: Whether no object may have a key twice.

    Raises:
        JsonTooLargeError: It has more than is taken.
        ValueError: It is no JSON.
    """
    for what, most, count in (
        ("brackets and braces", parts, text.count(b"[") + text.count(b"{")),
        ("commas", values, text.count(b",")),
    ):
        if count > most:
            raise JsonTooLargeError(f"{count} {what}", most)
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {shown(counts.most_common(1)[0][0])} occurs twice")
    return found
