"""Numbers of things, as messages say them."""

from __future__ import annotations


def counted(count: int, what: str, many: str = "") -> str:
    """A number of things in words, such as `1 adapter` or `2 adapters`.

    Args:
        count: How many.
        what: The word for one.
        many: The word for several, if an `s` does not make it.
    """
    return f"{count} {what if count == 1 else many or f'{what}s'}"
