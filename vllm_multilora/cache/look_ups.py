"""Hits and misses: one look-up each time an adapter joins the running batch."""

from __future__ import annotations

from collections.abc import Container

from vllm_multilora.cache.events import CacheEvents
from vllm_multilora.cache.states import Tier


class LookUps:
    """Turns steps into the hit and miss events of both tiers.

    Args:
        events: Told of every look-up.
    """

    def __init__(self, events: CacheEvents) -> None:
        self._events = events
        self._step: frozenset[int] = frozenset()
        # Loaded because a request waited, and not in a slot since. The weights have arrived
        # when the step begins; that they had not when they were asked for is the miss.
        self._fresh: set[int] = set()
        # Looked up before the step that they are for.
        self._ahead: set[int] = set()

    def loaded_on_demand(self, adapter_id: int) -> None:
        self._fresh.add(adapter_id)

    def forget(self, adapter_id: int) -> None:
        """The adapter got a slot, or lost its host copy."""
        self._fresh.discard(adapter_id)

    def count_ahead(self, adapter_id: int) -> None:
        """Counts the look-up of an adapter that gets a slot for a step to come."""
        self._count_missing(adapter_id)
        self._ahead.add(adapter_id)

    def left_slot(self, adapter_id: int) -> None:
        """The adapter has no slot any more: a step that needs it looks it up anew."""
        self._ahead.discard(adapter_id)

    def count(self, step: frozenset[int], unplaced: list[int], in_slots: Container[int]) -> None:
        """Counts the look-ups of a step.

        Args:
            step: Its adapters.
            unplaced: Those without a slot so far, ascending.
            in_slots: Adapters with a slot so far.
        """
        for adapter_id in sorted(step - self._step):
            if adapter_id in in_slots and adapter_id not in self._ahead:
                self._events.hit(Tier.GPU, adapter_id)
        self._ahead -= step
        for adapter_id in unplaced:
            self._count_missing(adapter_id)
        self._step = step

    def _count_missing(self, adapter_id: int) -> None:
        self._events.miss(Tier.GPU, adapter_id)
        if adapter_id in self._fresh:
            self._events.miss(Tier.CPU, adapter_id)
        else:
            self._events.hit(Tier.CPU, adapter_id)
