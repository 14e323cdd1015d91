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


class AllOf(SlotEvents):
    """Passes every event on.

    Args:
        *receivers: To these, in this order.
    """

    def __init__(self, *receivers: SlotEvents) -> None:
        self._receivers = receivers

    def hit(self, tier: Tier, adapter_id: int) -> None:
        for receiver in self._receivers:
            receiver.hit(tier, adapter_id)

    def miss(self, tier: Tier, adapter_id: int) -> None:
        for receiver in self._receivers:
            receiver.miss(tier, adapter_id)

    def assigned(self, adapter_id: int, slot: int) -> None:
        for receiver in self._receivers:
            receiver.assigned(adapter_id, slot)

    def filled(self, adapter_id: int, slot: int) -> None:
        for receiver in self._receivers:
            receiver.filled(adapter_id, slot)

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        for receiver in self._receivers:
            receiver.evicted(tier, adapter_id)

    def left(self, adapter_id: int, slot: int) -> None:
        for receiver in self._receivers:
            receiver.left(adapter_id, slot)
