"""Caches in given situations, for the tests."""

from collections.abc import Iterable

from vllm_multilora.cache import AdapterCache, CpuBudget
from vllm_multilora.cache.events import CacheEvents
from vllm_multilora.cache.states import Tier

MIB = 2**20


def load(cache: AdapterCache, adapter_id: int, size: int = MIB, *, evict: bool = True):
    cache.register(adapter_id)
    cache.start_loading(adapter_id)
    return cache.finish_loading(adapter_id, size, evict=evict)


def make_cache(
    *, slots: int = 2, adapters: int | None = None, size: int | None = None, loaded=(), **options
) -> AdapterCache:
    """A cache with the adapters of `loaded` in host memory, of one MiB each."""
    cache = AdapterCache(slots=slots, budget=CpuBudget(adapters, size), **options)
    for adapter_id in loaded:
        load(cache, adapter_id)
    return cache


class Recorder(CacheEvents):
    """Events in words, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def hit(self, tier: Tier, adapter_id: int) -> None:
        self.seen.append(f"hit {tier.value} {adapter_id}")

    def miss(self, tier: Tier, adapter_id: int) -> None:
        self.seen.append(f"miss {tier.value} {adapter_id}")

    def loaded(self, adapter_id: int, size: int) -> None:
        self.seen.append(f"loaded {adapter_id} of {size}")

    def load_failed(self, adapter_id: int, reason: str) -> None:
        self.seen.append(f"failed {adapter_id}: {reason}")

    def activated(self, adapter_id: int, slot: int, size: int) -> None:
        self.seen.append(f"activated {adapter_id} in {slot} of {size}")

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        self.seen.append(f"evicted {tier.value} {adapter_id}")

    def take(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen


def steps(cache: AdapterCache, *batches: Iterable[int]) -> None:
    for batch in batches:
        cache.begin_step(batch)
