"""What the cache decides and its owner carries out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Activation:
    """An adapter gets a slot: copy its weights there before the step.

    Attributes:
        adapter_id: The adapter.
        slot: Its slot from now on.
        displaced: The adapter that had the slot and keeps its host copy; None if it was free.
    """

    adapter_id: int
    slot: int
    displaced: int | None


@dataclass(frozen=True)
class Admission:
    """The outcome of a load.

    Attributes:
        admitted: Whether the adapter is in the CPU tier now. If not, it is on disk again, and its
            packed copy is to be dropped.
        evicted: Adapters that left the tier for it, in the order chosen; their host copies are
            to be dropped.
    """

    admitted: bool
    evicted: tuple[int, ...] = ()
