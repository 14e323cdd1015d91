"""What happens in the cache, for those who count it: metrics and simulation."""

from __future__ import annotations

from vllm_multilora.cache.states import AdapterState, Tier


class CacheEvents:
    """Receives the cache's events; every method does nothing until overridden.

    A look-up is counted when an adapter joins the running batch, not in each of its steps. Every
    GPU miss is followed by one CPU hit (the host copy was there) or one CPU miss (it had to be
    loaded for this use). Events come after the change that they tell of.
    """

    def hit(self, tier: Tier, adapter_id: int) -> None:
        """The tier had the adapter when a step needed it."""

    def miss(self, tier: Tier, adapter_id: int) -> None:
        """The tier did not have the adapter when a step needed it."""

    def loaded(self, adapter_id: int, size: int) -> None:
        """The adapter entered the CPU tier from disk with `size` bytes."""

    def load_failed(self, adapter_id: int, reason: str) -> None:
        """Loading the adapter failed."""

    def activated(self, adapter_id: int, slot: int, size: int) -> None:
        """The adapter got a slot; `size` bytes are to be copied there."""

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        """The adapter left the tier to make room; not told of unloading or lost weights."""

    def moved(self, adapter_id: int, state: AdapterState) -> None:
        """The adapter is in another state, for whatever reason, unloading included.

        Comes in the midst of the change: tiers and sizes may not be up to date yet.
        """


class AllOf(CacheEvents):
    """Passes every event on.

    Args:
        *receivers: To these, in this order.
    """

    def __init__(self, *receivers: CacheEvents) -> None:
        self._receivers = receivers

    def hit(self, tier: Tier, adapter_id: int) -> None:
        for receiver in self._receivers:
            receiver.hit(tier, adapter_id)

    def miss(self, tier: Tier, adapter_id: int) -> None:
        for receiver in self._receivers:
            receiver.miss(tier, adapter_id)

    def loaded(self, adapter_id: int, size: int) -> None:
        for receiver in self._receivers:
            receiver.loaded(adapter_id, size)

    def load_failed(self, adapter_id: int, reason: str) -> None:
        for receiver in self._receivers:
            receiver.load_failed(adapter_id, reason)

    def activated(self, adapter_id: int, slot: int, size: int) -> None:
        for receiver in self._receivers:
            receiver.activated(adapter_id, slot, size)

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        for receiver in self._receivers:
            receiver.evicted(tier, adapter_id)

    def moved(self, adapter_id: int, state: AdapterState) -> None:
        for receiver in self._receivers:
            receiver.moved(adapter_id, state)
