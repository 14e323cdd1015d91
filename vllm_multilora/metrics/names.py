"""Bounds the values of the label `lora_name`: every series costs Prometheus memory for weeks."""

from __future__ import annotations

import threading

OTHER = "__other__"
"""The label of all adapters beyond the bound."""

BLENDS = "__blends__"
"""The label of all blends: there are as many as clients think of."""

SHARED = frozenset({OTHER, BLENDS})
"""The labels that are no adapter's."""

_MOST_BYTES = 255


class BoundedNames:
    """Gives the first adapters that are known to be some a label each, and all others `OTHER`.

    A name counts once its adapter was loaded: what clients ask for, and what cannot be had, takes
    no place. A name keeps its label for as long as the process lives: a series that changed hands
    would count one customer's requests as another's. So a name that is never used again keeps its
    place.

    Args:
        limit: Most names with a label of their own.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._labels: set[str] = set()
        self._lock = threading.Lock()  # guards additions

    def admit(self, name: str) -> None:
        """An adapter of this name was loaded; it has a label from now on if there is room.

        A name that is long or cannot be printed, as `LLM(...)` takes them, gets none.
        """
        if name not in self._labels:
            with self._lock:
                if len(self._labels) < self._limit and fit(name) == name:
                    self._labels.add(name)

    def has(self, name: str) -> bool:
        """Whether a name has a label of its own."""
        return name in self._labels

    def label(self, name: str) -> str:
        """The name's label: itself, or `OTHER`."""
        return name if name in self._labels else OTHER


def fit(name: str) -> str:
    """A name as a label's value; `OTHER` if it is long, or cannot be printed or encoded."""
    # Printable is what can be encoded; what is far too long is looked at no further.
    is_fit = len(name) <= _MOST_BYTES and name.isprintable()
    return name if is_fit and len(name.encode()) <= _MOST_BYTES else OTHER
