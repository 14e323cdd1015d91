"""Numbers and names of things, as messages say them."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from itertools import islice


def counted(count: int, what: str, many: str = "") -> str:
    """A number of things in words, such as `1 adapter` or `2 adapters`.

    Args:
        count: How many.
        what: The word for one.
        many: The word for several, if an `s` does not make it.
    """
    return f"{count} {what if count == 1 else many or f'{what}s'}"


def listed(names: Collection[str], most: int) -> str:
    """Names in words, such as `a, b and 3 more`: the first so many, and how many others."""
    more = len(names) - most
    return ", ".join(islice(names, most)) + (f" and {more} more" if more > 0 else "")


def guess(name: str, known: Collection[str]) -> str:
    """What a message adds of an unknown name, such as `; did you mean 'a'?`; empty if nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
