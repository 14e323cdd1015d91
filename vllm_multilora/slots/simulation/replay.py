"""Replays a trace against slots and policies as they run in the server, and a model of its memory.

The running batch are the most recent requests, `concurrency` of them. Each request makes a step
with the batch's adapters: its own is read if it is neither in a slot nor in host memory, and copied
if it is not in a slot. If the batch's adapters are more than the slots, its oldest requests end
early, as a scheduler would not have admitted so many.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.assignment import SlotAssignment
from vllm_multilora.slots.budget import MIB, CpuBudget
from vllm_multilora.slots.events import SlotEvents, Tier
from vllm_multilora.slots.policies.lru import LruPolicy
from vllm_multilora.slots.policies.policy_registry import make_policy
from vllm_multilora.slots.simulation.host_tier import HostTier
from vllm_multilora.wording import counted


@dataclass(frozen=True)
class ServerShape:
    """The server that a trace is replayed on.

    Attributes:
        slots: Its `--max-loras`.
        budget: Limits of its host memory.
        concurrency: Requests in the running batch, at least 1.

    Raises:
        ConfigError: A number is out of range, or host memory is for fewer adapters than slots.
    """

    slots: int
    budget: CpuBudget
    concurrency: int = 8

    def __post_init__(self) -> None:
        SlotAssignment(self.slots, LruPolicy())  # checks their number
        if self.budget.adapters is not None and self.budget.adapters < self.slots:
            raise ConfigError(
                "vLLM needs host memory for at least as many adapters as slots, got "
                f"{self.budget.adapters} for {counted(self.slots, 'slot')}: raise --max-cpu-loras "
                "or lower --max-loras"
            )
        if self.concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {self.concurrency}")

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Checks that host memory has room for each of these adapters alone, given their bytes.

        Raises:
            ConfigError: It has not.
        """
        for adapter, size in sizes.items():
            if not self.budget.fits(1, size):
                raise ConfigError(
                    f"adapter {adapter!r} has {size / MIB:.1f} MiB, more than the whole CPU "
                    f"budget ({self.budget}); raise --cpu-cache-gib"
                )


@dataclass
class Outcome:
    """What a trace cost under one policy.

    Attributes:
        policy: Its name.
        requests: Requests of the trace.
        gpu_hits: Requests whose adapter was in a slot as they arrived.
        cpu_hits: Requests whose adapter was in a slot or in host memory: nothing was read.
        loads: Loads from disk.
        activations: Copies into slots.
        gpu_evictions: Adapters that lost their slots to others.
        cpu_evictions: Adapters that lost their place in host memory to others.
        bytes_loaded: Bytes moved from disk to host memory.
        bytes_activated: Bytes moved from host memory to slots.
    """

    policy: str
    requests: int
    gpu_hits: int = 0
    cpu_hits: int = 0
    loads: int = 0
    activations: int = 0
    gpu_evictions: int = 0
    cpu_evictions: int = 0
    bytes_loaded: int = 0
    bytes_activated: int = 0

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
        cpu_hit_rate: Most that can find it in a slot or in host memory, as a share.
        loads: Fewest loads from disk.
        activations: Fewest copies into slots.
        compulsory: Loads and activations that even boundless memory would need: one an adapter.
    """

    gpu_hit_rate: float
    cpu_hit_rate: float
    loads: int
    activations: int
    compulsory: int


class _Server(SlotEvents):
    """Slots and host memory, in which everything happens at once; notes what happens."""

    def __init__(self, shape: ServerShape, outcome: Outcome, sizes: Sequence[int]) -> None:
        self._slots = SlotAssignment(shape.slots, make_policy(outcome.policy), self)
        self._host = HostTier(make_policy(outcome.policy), shape.budget)
        self._shape = shape
        # The most recent requests whose adapters have slots together, and their adapters.
        self._batch: deque[int] = deque()
        self._running: Counter[int] = Counter()
        self._sizes = sizes
        self._outcome = outcome

    def request(self, adapter_id: int) -> None:
        """A request arrives, and joins the running batch."""
        is_in_slot = self._slots.slot_of(adapter_id) is not None
        self._join_batch(adapter_id)
        running = frozenset(self._running)
        self._host.used(running)
        self._slots.running(running)
        self._outcome.gpu_hits += is_in_slot
        self._outcome.cpu_hits += is_in_slot or adapter_id in self._host
        if is_in_slot:
            return
        if adapter_id not in self._host:
            size = self._sizes[adapter_id]
            # Whatever was on its way into a slot has arrived there: nothing is on lease.
            victims = self._host.take(adapter_id, size)
            assert victims is not None  # `check_sizes`
            self._outcome.cpu_evictions += len(victims)
            self._outcome.loads += 1
            self._outcome.bytes_loaded += size
        assignment = self._slots.assign(adapter_id, pack=adapter_id)
        assert assignment is not None  # the batch has no more adapters than there are slots
        self._slots.filled(assignment.order)
        self._slots.running(running)

    def _join_batch(self, adapter_id: int) -> None:
        self._batch.append(adapter_id)
        self._running[adapter_id] += 1
        while len(self._batch) > self._shape.concurrency or len(self._running) > self._shape.slots:
            oldest = self._batch.popleft()
            self._running[oldest] -= 1
            if not self._running[oldest]:
                del self._running[oldest]

    def assigned(self, adapter_id: int, slot: int) -> None:
        self._outcome.activations += 1
        self._outcome.bytes_activated += self._sizes[adapter_id]

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        self._outcome.gpu_evictions += 1


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
    shape.check_sizes({adapter: sizes[adapter] for adapter in ids})
    outcome = Outcome(policy, len(requests))
    server = _Server(shape, outcome, [sizes[adapter] for adapter in ids])
    for adapter in requests:
        server.request(ids[adapter])
    return outcome


def optimum(requests: Sequence[str], sizes: Mapping[str, int], shape: ServerShape) -> Optimum:
    """The bounds for the same arguments; those of host memory are exact for equal sizes only.

    An adapter in a slot needs no host copy, so both tiers together may hold as many different
    adapters as each of them has places for.
    """
    distinct = set(requests)
    places = most_adapters(shape.budget, (sizes[adapter] for adapter in distinct))
    gpu_hits = optimal_hits(requests, shape.slots)
    cpu_hits = optimal_hits(requests, shape.slots + places)
    return Optimum(
        gpu_hit_rate=gpu_hits / len(requests),
        cpu_hit_rate=cpu_hits / len(requests),
        loads=len(requests) - cpu_hits,
        activations=len(requests) - gpu_hits,
        compulsory=len(distinct),
    )


def optimal_hits(requests: Sequence[Hashable], capacity: int) -> int:
    """Hits of a cache that gives up what is asked for again latest.

    Most hits possible for adapters of one size that enter the cache as they are asked for. A
    cache that must also keep the running batch can only have fewer, so the number bounds every
    policy of the simulation.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
    Journal 5(2), 1966; optimality: Mattson, Gecsei, Slutz and Traiger, IBM Systems Journal
    9(2), 1970.

    Args:
        requests: What is asked for, in order.
        capacity: Places in the cache, at least 1.
    """
    never = len(requests)
    next_use = [never] * len(requests)
    latest: dict[Hashable, int] = {}
    for position, requested in enumerate(requests):
        if requested in latest:
            next_use[latest[requested]] = position
        latest[requested] = position

    hits = 0
    cached: set[Hashable] = set()
    # Heap of (-next use, position). Entries are not taken out when their adapter is asked for
    # again, but their next use is past by then, so the farthest entry is always a current one.
    farthest: list[tuple[int, int]] = []
    for position, requested in enumerate(requests):
        if requested in cached:
            hits += 1
        elif len(cached) == capacity:
            _, asked = heapq.heappop(farthest)
            cached.remove(requests[asked])
        cached.add(requested)
        heapq.heappush(farthest, (-next_use[position], position))
    return hits


def most_adapters(budget: CpuBudget, sizes: Iterable[int]) -> int:
    """Most adapters that fit into the budget at once: the smallest ones.

    With it as the capacity, `optimal_hits` bounds caches of adapters of unlike sizes too, for
    which the true optimum is NP-hard to find.
    """
    totals = enumerate(accumulate(sorted(sizes)), start=1)
    return sum(1 for _ in takewhile(lambda held: budget.fits(*held), totals))
