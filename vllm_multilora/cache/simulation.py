"""Replays a trace against the adapter cache: the very classes that run in the server.

The running batch are the most recent requests, `concurrency` of them. Each request makes a step
with the batch's adapters: it is loaded if it is not in host memory, then the step begins. If the
batch's adapters are more than the slots, or larger than the byte budget, its oldest requests
end early, as a scheduler would not have admitted so many.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_multilora.cache.adapter_cache import AdapterCache
from vllm_multilora.cache.budget import MIB, CpuBudget
from vllm_multilora.cache.events import CacheEvents
from vllm_multilora.cache.optimum import most_adapters, optimal_hits
from vllm_multilora.cache.states import AdapterState, Tier
from vllm_multilora.errors import ConfigError


@dataclass(frozen=True)
class ServerShape:
    """The server that a trace is replayed on.

    Attributes:
        slots: Its `--max-loras`.
        budget: Limits of its host memory.
        concurrency: Requests in the running batch, at least 1.

    Raises:
        ConfigError: A number is out of range, or the budget holds fewer adapters than slots.
    """

    slots: int
    budget: CpuBudget
    concurrency: int = 8

    def __post_init__(self) -> None:
        AdapterCache(slots=self.slots, budget=self.budget)  # checks both
        if self.concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {self.concurrency}")


@dataclass(frozen=True)
class Outcome:
    """What a trace cost under one policy.

    Attributes:
        policy: Its name.
        requests: Requests of the trace.
        gpu_hits: Requests whose adapter was in a slot as they arrived.
        cpu_hits: Requests whose adapter was in host memory, in a slot or not.
        loads: Loads from disk.
        activations: Copies into slots.
        gpu_evictions: Adapters that lost their slots to others.
        cpu_evictions: Adapters that lost their place in host memory to others.
        bytes_loaded: Bytes moved from disk to host memory.
        bytes_activated: Bytes moved from host memory to slots.
    """

    policy: str
    requests: int
    gpu_hits: int
    cpu_hits: int
    loads: int
    activations: int
    gpu_evictions: int
    cpu_evictions: int
    bytes_loaded: int
    bytes_activated: int

    @property
    def gpu_hit_rate(self) -> float:
        return self.gpu_hits / self.requests

    @property
    def cpu_hit_rate(self) -> float:
        return self.cpu_hits / self.requests


@dataclass(frozen=True)
class Optimum:
    """Bounds that no policy can pass on a trace.

    Attributes:
        gpu_hit_rate: Most requests that can find their adapter in a slot, as a share.
        cpu_hit_rate: Most requests that can find it in host memory, as a share.
        loads: Fewest loads from disk.
        activations: Fewest copies into slots.
        compulsory: Loads and activations that even boundless memory would need: one an adapter.
    """

    gpu_hit_rate: float
    cpu_hit_rate: float
    loads: int
    activations: int
    compulsory: int


class _Tally(CacheEvents):
    def __init__(self) -> None:
        self.loads = self.bytes_loaded = self.activations = self.bytes_activated = 0
        self.evictions: Counter[Tier] = Counter()

    def loaded(self, adapter_id: int, size: int) -> None:
        self.loads += 1
        self.bytes_loaded += size

    def activated(self, adapter_id: int, slot: int, size: int) -> None:
        self.activations += 1
        self.bytes_activated += size

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        self.evictions[tier] += 1


class _RunningBatch:
    """The most recent requests whose adapters fit together, counted by adapter."""

    def __init__(self, shape: ServerShape, sizes: Sequence[int]) -> None:
        self._shape = shape
        self._sizes = sizes
        self._requests: deque[int] = deque()
        self._bytes = 0
        self.adapters: Counter[int] = Counter()

    def add(self, adapter_id: int) -> None:
        self._requests.append(adapter_id)
        if not self.adapters[adapter_id]:
            self._bytes += self._sizes[adapter_id]
        self.adapters[adapter_id] += 1
        while (
            len(self._requests) > self._shape.concurrency
            or len(self.adapters) > self._shape.slots
            or not self._shape.budget.fits(len(self.adapters), self._bytes)
        ):
            self._end_oldest()

    def _end_oldest(self) -> None:
        oldest = self._requests.popleft()
        self.adapters[oldest] -= 1
        if not self.adapters[oldest]:
            del self.adapters[oldest]
            self._bytes -= self._sizes[oldest]


def simulate(
    requests: Sequence[str], sizes: Mapping[str, int], shape: ServerShape, policy: str
) -> Outcome:
    """Replays requests under a policy.

    Args:
        requests: The adapter of each request, in the order of arrival; at least one.
        sizes: Bytes of every adapter.
        shape: The server.
        policy: A name that `registry` knows.

    Raises:
        PolicyError: There is no such policy.
        ConfigError: An adapter alone is larger than the byte budget.
    """
    ids = {adapter: i for i, adapter in enumerate(dict.fromkeys(requests))}
    for adapter in ids:
        if not shape.budget.fits(1, sizes[adapter]):
            raise ConfigError(
                f"adapter {adapter!r} has {sizes[adapter] / MIB:.1f} MiB, more than the whole CPU "
                f"budget ({shape.budget}); raise --cpu-cache-gib"
            )
    tally = _Tally()
    cache = AdapterCache(slots=shape.slots, budget=shape.budget, policy=policy, events=tally)
    for adapter_id in ids.values():
        cache.register(adapter_id)
    bytes_of = [sizes[adapter] for adapter in ids]
    batch = _RunningBatch(shape, bytes_of)
    found: Counter[AdapterState] = Counter()
    for adapter in requests:
        adapter_id = ids[adapter]
        found[cache.state(adapter_id)] += 1
        batch.add(adapter_id)
        for missing in cache.protect_step(batch.adapters):
            cache.start_loading(missing)
            cache.finish_loading(missing, bytes_of[missing], evict=True)
        cache.begin_step(batch.adapters)
    return Outcome(
        policy=policy,
        requests=len(requests),
        gpu_hits=found[AdapterState.GPU],
        cpu_hits=found[AdapterState.GPU] + found[AdapterState.CPU],
        loads=tally.loads,
        activations=tally.activations,
        gpu_evictions=tally.evictions[Tier.GPU],
        cpu_evictions=tally.evictions[Tier.CPU],
        bytes_loaded=tally.bytes_loaded,
        bytes_activated=tally.bytes_activated,
    )


def optimum(requests: Sequence[str], sizes: Mapping[str, int], shape: ServerShape) -> Optimum:
    """The bounds for the same arguments; those of host memory are exact for equal sizes only."""
    distinct = set(requests)
    places = most_adapters(shape.budget, (sizes[adapter] for adapter in distinct))
    gpu_hits = optimal_hits(requests, min(shape.slots, places))
    cpu_hits = optimal_hits(requests, places)
    return Optimum(
        gpu_hit_rate=gpu_hits / len(requests),
        cpu_hit_rate=cpu_hits / len(requests),
        loads=len(requests) - cpu_hits,
        activations=len(requests) - gpu_hits,
        compulsory=len(distinct),
    )
