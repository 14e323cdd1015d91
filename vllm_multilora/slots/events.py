"""Events in slots, for those who count them: metrics, usage and simulation."""

from __future__ import annotations

import enum


class Tier(enum.Enum):
    """Where weights lie ready; the values are the labels of the metrics."""

    GPU = "gpu"
    CPU = "cpu"


class SlotEvents:
    """Receives the events of a `SlotAssignment`; every method does nothing until overridden.

    A look-up is counted when an adapter joins the running batch, not in each of its steps. Every
    GPU miss is followed by one CPU hit (the host copy was there) or one CPU miss (it had to be
    read for this use). Events come after the change that they tell of.
    """

    def hit(self, tier: Tier, adapter_id: int) -> None:
        """The tier had the adapter when a request needed it."""

    def miss(self, tier: Tier, adapter_id: int) -> None:
        """The tier did not have the adapter when a request needed it."""

    def assigned(self, adapter_id: int, slot: int) -> None:
        """The adapter's weights are to be copied into the slot."""

    def filled(self, adapter_id: int, slot: int) -> None:
        """All ranks have the adapter's weights in the slot."""

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        """The adapter left the tier to make room; not told of unloading or lost weights."""

    def left(self, adapter_id: int, slot: int) -> None:
        """The adapter has lost its slot, for whatever reason."""
