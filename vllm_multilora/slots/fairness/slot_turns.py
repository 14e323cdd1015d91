"""Who gets a slot when more adapters want one than there are, and for how long.

Requests of adapters that have slots keep arriving, and a scheduler that always admits them never
frees a slot for the others. So adapters take turns. An adapter that has been kept waiting for
`patience` steps is overdue: for each overdue one, the adapter that has had its slot for the longest
is closed, so that no new request of it is admitted, and the next slot that becomes free is kept for
the one that has waited longest.

Bound: an adapter that begins to wait while `n` others do gets a slot within
`patience` + ceil((n + 1) / S) * L steps, with S slots and requests that run for at most L steps:
the patience, and then as many turns as it takes to serve those before it. Whoever comes later waits
behind it, whatever the order of the scheduler's queue, and so does the next request of an adapter
that has had its turn. While it waits for a lease, or its weights are fetched anew, it has a place,
but no slot is kept for it. It has to come for its slot: requests that wait for tokens or memory
beside it are the scheduler's affair. One that has no request left which could come, since the one
that wanted the slot was aborted, say, has it no more: that is asked when others have waited beside
it for `patience` steps.

With fair shares the slots that are kept for the overdue go, of all that wait, to those whose
flows have had least of the engine, and those are closed whose flows have had most, but for
nobody who has had more: many adapters of one tenant count as one. The bound is then that of the
shares: a flow waits while others have had less.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, KeysView
from itertools import islice, takewhile

PATIENCE_STEPS = 16
"""Steps that an adapter waits for a slot before others have to make room."""


class SlotTurns:
    """Admits requests to slots; pure bookkeeping over adapters and steps."""

    def __init__(self, patience: int = PATIENCE_STEPS) -> None:
        self._patience = patience
        self._step = 0
        self._since: dict[int, int] = {}  # adapters with slots -> step since when
        self._waiting: dict[int, int] = {}  # -> step since when, longest first
        self._closed: frozenset[int] = frozenset()
        # Admitted, and on their way into their slots.
        self._placing: set[int] = set()
        # Free slots of this step: the adapters they are kept for, and how many anybody may have.
        self._next: set[int] = set()
        self._free = 0
        # Of those that have to come for their slots, since they last came: the steps in which
        # others have waited.
        self._missed: dict[int, int] = {}

    def begin_step(
        self,
        active: Collection[int],
        slots: int,
        order: Callable[[int], float] | None = None,
        may_come: Callable[[], Container[object]] = tuple,
        at_hand: Callable[[int], bool] = lambda adapter_id: True,
    ) -> None:
        """A step is being scheduled.

        Args:
            active: The adapters of all running requests; those of pinned adapters left out.
            slots: How many of them can have slots. Where more have some, as after a call that pins
                another adapter, so many are closed at once, as for the overdue.
            order: What is kept for the overdue goes to those that wait, overdue or not, with the
                least of this first, and among equals to those that have waited longest; those with
                the most are closed first, and for those with no more of it only.
            may_come: The adapters that have requests waiting in the queue, though none comes: those
                before them may take all places each time. Asked where that matters.
            at_hand: Whether an adapter that was asked about could be brought into a slot now.
        """
        self._step += 1
        others_wait = len(self._waiting) > len(self._waiting.keys() & self._next)
        missed = {i: steps + others_wait for i, steps in self._missed.items()}
        late = [i for i, steps in missed.items() if steps >= self._patience]
        coming = may_come() if late else ()
        for adapter_id in late:
            del missed[adapter_id]
            if adapter_id not in coming:
                self.forget(adapter_id)
        self._placing = set(filter(at_hand, self._placing))
        self._since = {i: self._since.get(i, self._step) for i in (*active, *self._placing)}
        free = max(0, slots - len(self._since))
        # Those that have waited longest are first; for more than these there are no slots to have.
        first = takewhile(lambda i: self._step - self._waiting[i] >= self._patience, self._waiting)
        overdue = list(islice(filter(at_hand, first), free + len(active)))
        had = order or (lambda adapter_id: 0.0)
        ahead = overdue
        if overdue and order is not None:
            ahead = list(islice(filter(at_hand, sorted(self._waiting, key=order)), len(overdue)))
        kept = min(free, len(overdue))
        self._next = set(ahead[:kept])
        self._free = free - kept
        self._missed = {i: missed.get(i, 0) for i in (*self._next, *self._placing)}
        self._closed = frozenset()
        excess = max(0, len(self._since) - slots)
        if excess or kept < len(overdue):
            most = sorted(active, key=lambda i: (-had(i), self._since[i], i))
            pairs = zip(ahead[kept:], most[excess:], strict=False)
            self._closed = frozenset(
                (*most[:excess], *(i for other, i in pairs if had(other) <= had(i)))
            )

    def admit(self, adapter_id: int) -> bool:
        """Whether a waiting request of an adapter may run now; asked in the queue's order."""
        self._missed.pop(adapter_id, None)
        self._placing.discard(adapter_id)
        if adapter_id in self._since:
            return adapter_id not in self._closed
        if adapter_id not in self._next:
            if not self._free:
                self.wait(adapter_id)
                return False
            self._free -= 1
        self._since[adapter_id] = self._step
        self._waiting.pop(adapter_id, None)
        return True

    def wait(self, adapter_id: int) -> None:
        """A request of the adapter waits from now on, be it not for a slot alone yet."""
        if adapter_id not in self._since:
            self._waiting.setdefault(adapter_id, self._step)

    def place(self, adapter_id: int) -> None:
        """An adapter that was admitted is on its way into its slot.

        It keeps its turn until a request of it comes again, in however many steps, and is not
        closed before one has run, whoever is overdue.
        """
        self._placing.add(adapter_id)

    @property
    def waiting(self) -> KeysView[int]:
        """The adapters that have asked for slots and wait for them."""
        return self._waiting.keys()

    def turns_away(self, adapter_id: int) -> bool:
        """Whether an adapter waits for a slot, and has none to come for in this step."""
        return adapter_id in self._waiting and adapter_id not in self._next and not self._free

    def forget(self, adapter_id: int) -> None:
        """No request of the adapter waits for a slot any more: none is kept for it."""
        self._waiting.pop(adapter_id, None)
        self._placing.discard(adapter_id)
