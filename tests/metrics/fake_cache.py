"""A real cache whose events become metrics, without engines or files of adapters."""

from pathlib import Path

from vllm_multilora.cache import AdapterCache, CpuBudget
from vllm_multilora.metrics.tier_metrics import TierMetrics

from .readings import recorder

MIB = 1 << 20


class CacheWithMetrics:
    """Two slots and room for three adapters, whose names are `a`, `b`, ... by their numbers."""

    def __init__(self, folder: Path, *, most: int = 10) -> None:
        self.names: dict[int, str] = {number: chr(96 + number) for number in range(1, 20)}
        self.ranks: dict[int, int] = {}
        self.metrics = TierMetrics(
            recorder(folder, most=most), self.names.get, lambda number: self.ranks.get(number)
        )
        budget = CpuBudget(adapters=3, bytes=100 * MIB)
        self.cache = AdapterCache(slots=2, budget=budget, events=self.metrics)
        self.metrics.begin(self.cache, max_rank=64)

    def load(self, number: int, *, evict: bool = False, rank: int = 8) -> None:
        self.cache.register(number)
        self.cache.start_loading(number)
        self.metrics.read(self.names[number], 0.02)
        self.ranks[number] = rank
        self.cache.finish_loading(number, rank * MIB, evict=evict)
        self.metrics.settle(self.cache)

    def step(self, *numbers: int) -> None:
        self.metrics.step(len(numbers))
        for activation in self.cache.begin_step(numbers):
            self.metrics.copied(activation.adapter_id, 0.005)
        self.metrics.settle(self.cache)
