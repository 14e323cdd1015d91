"""The cache's events, as several receivers get them."""

from typing import Any

from vllm_multilora.cache import AdapterCache, AdapterState, CacheEvents, CpuBudget, Tier
from vllm_multilora.cache.events import AllOf


class Listener(CacheEvents):
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def hit(self, tier: Tier, adapter_id: int) -> None:
        self.heard.append(("hit", tier, adapter_id))

    def miss(self, tier: Tier, adapter_id: int) -> None:
        self.heard.append(("miss", tier, adapter_id))

    def loaded(self, adapter_id: int, size: int) -> None:
        self.heard.append(("loaded", adapter_id, size))

    def load_failed(self, adapter_id: int, reason: str) -> None:
        self.heard.append(("load_failed", adapter_id, reason))

    def activated(self, adapter_id: int, slot: int, size: int) -> None:
        self.heard.append(("activated", adapter_id, slot, size))

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        self.heard.append(("evicted", tier, adapter_id))

    def moved(self, adapter_id: int, state: AdapterState) -> None:
        self.heard.append(("moved", adapter_id, state))


def live(events: CacheEvents) -> None:
    """A cache's life, with every kind of event in it."""
    cache = AdapterCache(slots=1, budget=CpuBudget(adapters=1), events=events)
    for adapter_id in (1, 2):
        cache.register(adapter_id)
        cache.start_loading(adapter_id)
        cache.fail_loading(adapter_id, "gone")
        cache.start_loading(adapter_id)
        cache.finish_loading(adapter_id, 10, evict=True)
        cache.begin_step([adapter_id])
        cache.begin_step([])
        cache.begin_step([adapter_id])
        cache.end_step()
    cache.remove(2)


def test_all_receivers_hear_everything_in_the_same_order() -> None:
    first, second = Listener(), Listener()
    live(AllOf(first, second))
    assert first.heard == second.heard
    assert {kind for kind, *_ in first.heard} == {
        *("hit", "miss", "loaded", "load_failed", "activated", "evicted", "moved")
    }


def test_every_change_of_state_is_told_to_the_end() -> None:
    listener = Listener()
    live(listener)
    states = [
        state
        for kind, adapter_id, *rest in listener.heard
        for state in rest[:1]
        if kind == "moved" and adapter_id == 2
    ]
    assert states == [
        AdapterState.DISK,
        AdapterState.LOADING,
        AdapterState.FAILED,
        AdapterState.LOADING,
        AdapterState.CPU,
        AdapterState.GPU,
        AdapterState.CPU,
        AdapterState.GONE,
    ]
