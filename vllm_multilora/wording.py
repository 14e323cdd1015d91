"""Numbers and names of things, as messages say them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from itertools import islice

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e]")
"""What a terminal, a log's reader or a router of requests takes for more than text."""


def printable(text: str) -> str:
    """A text, with what cannot be printed as Python writes it in `repr`."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def counted(count: int, what: str, many: str = "") -> str:
    """A number of things in words, such as `1 adapter` or `2 adapters`."""
    return f"{count} {what if count == 1 else many or f'{what}s'}"


def listed(names: Collection[str], most: int) -> str:
    """Names in words, such as `a, b and 3 more`: the first so many, and how many others."""
    more = len(names) - most
    return ", ".join(islice(names, most)) + (f" and {more} more" if more > 0 else "")


def guess(name: str, known: Collection[str]) -> str:
    """What a message adds of an unknown name, such as `; did you mean 'a'?`; empty if nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def adapter_kind(*, invocation_tokens: Sequence[int], dora: bool, parts: Sequence[str] = ()) -> str:
    """What people call an adapter: `blend`, `alora` if tokens activate it, `dora`, else `lora`."""
    if parts:
        return "blend"
    if invocation_tokens:
        return "alora"
    return "dora" if dora else "lora"
