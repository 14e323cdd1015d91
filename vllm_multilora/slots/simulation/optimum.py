"""An upper bound for every policy: Belady's rule, which knows the future."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Sequence

from vllm_multilora.slots.budget import CpuBudget


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
    for position in range(len(requests) - 1, -1, -1):
        next_use[position] = latest.get(requests[position], never)
        latest[requests[position]] = position

    hits = 0
    cached: set[Hashable] = set()
    # Heap of (-next use, position). Entries are not taken out when their adapter is asked for
    # again, but their next use is past by then, so the farthest entry is always a current one.
    farthest: list[tuple[int, int]] = []
    for position, wanted in enumerate(requests):
        if wanted in cached:
            hits += 1
        elif len(cached) == capacity:
            _, asked = heapq.heappop(farthest)
            cached.remove(requests[asked])
        cached.add(wanted)
        heapq.heappush(farthest, (-next_use[position], position))
    return hits


def most_adapters(budget: CpuBudget, sizes: Iterable[int]) -> int:
    """Most adapters that fit into the budget at once: the smallest ones.

    With it as the capacity, `optimal_hits` bounds caches of adapters of unlike sizes too, for
    which the true optimum is NP-hard to find.
    """
    count = total = 0
    for size in sorted(sizes):
        if not budget.fits(count + 1, total + size):
            break
        count += 1
        total += size
    return count
