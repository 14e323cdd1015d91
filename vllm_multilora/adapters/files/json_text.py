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
    """A text would become more than is taken."""

    def __init__(self, found: str, most: int) -> None:
        super().__init__(f"it has {found}, and at most {most} are taken")
        self.found = found
        self.most = most


def parse_json(text: bytes | bytearray, *, parts: int, values: int, unique: bool = False) -> Any:
    """Parses a text in UTF-8 of at most so many brackets and braces (`parts`), commas (`values`).

    Those in strings count too. With `unique`, no object may have a key twice.

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
