"""Bounds the values of labels: every series costs Prometheus memory for weeks."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import islice, takewhile
from typing import Generic, TypeVar

OTHER = "__other__"
"""The label of all adapters beyond the bound."""

BLENDS = "__blends__"
"""The label of all blends: there are as many as clients think of."""

SHARED = frozenset({OTHER, BLENDS})
"""The labels that are no adapter's."""

IDLE_S = 86_400.0
"""Without a count for so long, a place may go to somebody else."""

_MAX_BYTES = 255
_AT_ONCE = 16  # a sixteenth of the places, as a file is written anew for it
_RETRY_S = 60.0

Holder = TypeVar("Holder", bound=Hashable)


class Places(Generic[Holder]):
    """Gives series of their own to as many as there are places.

    Who comes first has a place. If none is free for the next, those lose theirs who have not been
    counted for a day, longest ago first: in months those who have left give way to those who have
    come, and as no more can be new in a day than there are places, nobody adds to Prometheus' load
    by coming and going.

    Args:
        limit: Most places.
        vacate: Removes the series of those who lose their places, for good; returns whether it
            could.
        clock: Seconds; only differences count.
    """

    def __init__(
        self,
        limit: int,
        vacate: Callable[[frozenset[Holder]], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._vacate = vacate
        self._clock = clock
        self._counted: OrderedDict[Holder, float] = OrderedDict()  # longest ago first
        self._next_try = 0.0
        self._lock = threading.Lock()

    def has(self, who: Holder) -> bool:
        return who in self._counted

    def keep(self, who: Holder) -> bool:
        """Whether somebody who is counted now has a place."""
        with self._lock:
            return who in self._counted and self._note(who)

    def take(self, who: Holder) -> bool:
        """Likewise, and gives them one if one can be had."""
        with self._lock:
            is_there = who in self._counted or len(self._counted) < self._limit
            return (is_there or self._make_room()) and self._note(who)

    def _note(self, who: Holder) -> bool:
        self._counted[who] = self._clock()
        self._counted.move_to_end(who)
        return True

    def _make_room(self) -> bool:
        now = self._clock()
        idle = takewhile(lambda who: now - self._counted[who] >= IDLE_S, self._counted)
        leaving = frozenset(islice(idle, self._limit // _AT_ONCE + 1))
        if not leaving or now < self._next_try:
            return False
        if not self._vacate(leaving):
            self._next_try = now + _RETRY_S
            return False
        for who in leaving:
            del self._counted[who]
        return True


class BoundedNames(Places[str]):
    """Gives as many adapters that are known to be some a label each, and all others `OTHER`.

    A name counts once its adapter was loaded: what clients ask for, and what cannot be had, takes
    no place.
    """

    on_admitted: Callable[[str], None] | None = None

    def admit(self, name: str) -> None:
        """An adapter of this name is loaded; it has a label from now on if there is room.

        A name that is long or cannot be printed, as `LLM(...)` takes them, gets none.
        """
        is_new = not self.has(name) and fit(name) == name != OTHER and self.take(name)
        if is_new and self.on_admitted is not None:
            self.on_admitted(name)

    def label(self, name: str) -> str:
        """The label of a name that is counted now: itself, or `OTHER`."""
        return name if self.keep(name) else OTHER


def fit(name: str) -> str:
    """A name as a label's value; `OTHER` if it is long, or cannot be printed or encoded."""
    # Printable is what can be encoded; what is far too long is looked at no further.
    is_fit = len(name) <= _MAX_BYTES and name.isprintable()
    return name if is_fit and len(name.encode()) <= _MAX_BYTES else OTHER
