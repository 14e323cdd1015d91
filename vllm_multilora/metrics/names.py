"""Bounds the values of the label `lora_name`: every series costs Prometheus memory for weeks."""

from __future__ import annotations

import threading

OTHER = "__other__"
"""The label of all adapters beyond the bound."""

_LONGEST = 200


class BoundedNames:
    """Gives the first names that come a label each, and all later ones `OTHER`.

    A name keeps its label for as long as the process lives: a series that changed hands would
    count one customer's requests as another's. So a name that is never used again keeps its place.

    Args:
        limit: Most names with a label of their own.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._labels: dict[str, str] = {}
        self._lock = threading.Lock()  # guards additions

    def label(self, name: str) -> str:
        """The name's label: itself, or `OTHER`; a very long name is cut."""
        label = self._labels.get(name)
        if label is not None:
            return label
        with self._lock:
            if len(self._labels) >= self._limit:
                return self._labels.get(name, OTHER)
            return self._labels.setdefault(name, name[:_LONGEST])
