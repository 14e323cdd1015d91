"""Who gets a slot when more adapters want one than there are, and for how long.

Requests of adapters that have slots keep arriving, and a scheduler that always admits them never
frees a slot for the others. So adapters take turns: once somebody has been kept waiting for
`patience` steps, the adapters that have had their slots for the longest are closed, one for each
that waits too long: no new request of theirs is admitted until their running ones have ended and
the slot has gone on.

Bound: an adapter that is ready gets a slot after at most `patience` steps plus the steps that the
running requests of the adapters then closed take to end, if fewer adapters wait than there are
slots; otherwise after as many such turns as it takes to serve those that have waited longer.
"""

from __future__ import annotations

from collections.abc import Iterable

PATIENCE_STEPS = 16
"""Steps that an adapter waits for a slot before others have to make room."""


class SlotTurns:
    """Admits requests to slots; pure bookkeeping over adapters and steps.

    Args:
        patience: Steps that an adapter may be kept waiting without consequences.
    """

    def __init__(self, patience: int = PATIENCE_STEPS) -> None:
        self._patience = patience
        self._step = 0
        self._slots = 0
        self._since: dict[int, int] = {}  # adapters with slots -> step since when
        self._waiting: dict[int, tuple[int, int]] = {}  # -> first and last step kept waiting
        self._closed: frozenset[int] = frozenset()

    @property
    def closed(self) -> frozenset[int]:
        """The adapters that are to give up their slots."""
        return self._closed

    def begin_step(self, active: Iterable[int], slots: int) -> None:
        """A step is being scheduled.

        Args:
            active: The adapters of all running requests; those of pinned adapters left out.
            slots: How many of them can have slots.
        """
        self._step += 1
        self._slots = slots
        self._since = {adapter_id: self._since.get(adapter_id, self._step) for adapter_id in active}
        # Nobody has asked on its behalf for a while: its requests were aborted or are done.
        self._waiting = {
            adapter_id: (first, last)
            for adapter_id, (first, last) in self._waiting.items()
            if self._step - last <= self._patience and adapter_id not in self._since
        }
        overdue = sum(self._step - first >= self._patience for first, _ in self._waiting.values())
        free = max(0, slots - len(self._since))
        longest = sorted(self._since, key=lambda adapter_id: (self._since[adapter_id], adapter_id))
        self._closed = frozenset(longest[: max(0, overdue - free)])

    def admit(self, adapter_id: int) -> bool:
        """Whether a waiting request of an adapter may run now; asked in the queue's order."""
        if adapter_id in self._since:
            return adapter_id not in self._closed
        if len(self._since) < self._slots:
            self._since[adapter_id] = self._step
            self._waiting.pop(adapter_id, None)
            return True
        first, _ = self._waiting.get(adapter_id, (self._step, 0))
        self._waiting[adapter_id] = (first, self._step)
        return False
