"""Hits and misses: one look-up each time an adapter joins the running batch."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_multilora.slots.events import SlotEvents, Tier


class LookUps:
    """Turns what joins the running batch into the hit and miss events of both tiers.

    An adapter is copied into its slot before it joins. What counts is what was there when it was
    asked for: a slot that it got for this use is a miss, and a host copy that was read for this
    use is another.

    Args:
        events: Told of every look-up.
    """

    def __init__(self, events: SlotEvents) -> None:
        self._events = events
        self._read: set[int] = set()
        self._brought: set[int] = set()

    def read_on_demand(self, adapter_id: int) -> None:
        """The adapter's files were read because a request waited for it."""
        self._read.add(adapter_id)

    def brought(self, adapter_id: int) -> None:
        """The adapter, which does not run yet, got a slot."""
        self._brought.add(adapter_id)

    def forget(self, adapter_id: int) -> None:
        """Nothing that was fetched for the adapter counts any more."""
        self._read.discard(adapter_id)
        self._brought.discard(adapter_id)

    def joined(self, adapters: Iterable[int]) -> None:
        """Counts the look-ups of the adapters that have joined the running batch."""
        for adapter_id in sorted(adapters):
            if adapter_id not in self._brought:
                self._events.hit(Tier.GPU, adapter_id)
            else:
                self._events.miss(Tier.GPU, adapter_id)
                if adapter_id in self._read:
                    self._events.miss(Tier.CPU, adapter_id)
                else:
                    self._events.hit(Tier.CPU, adapter_id)
            self.forget(adapter_id)
