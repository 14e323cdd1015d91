"""Host time that the adapter cache takes of an engine step when every adapter has its slot.

    python benchmarks/cache_step.py

`same`: the step has the adapters of the step before, as most decoding steps do; they come as a
list or as a frozenset. `other`: one adapter in 64 differs, so that the policies of both tiers are
told. Minimum over repeats, microseconds a step.
"""

from __future__ import annotations

import timeit
from collections.abc import Iterable, Sequence

from vllm_multilora.cache.adapter_cache import AdapterCache
from vllm_multilora.cache.budget import CpuBudget
from vllm_multilora.cache.registry import policy_names

ADAPTERS = 64
STEPS = 100  # short runs, so that some are undisturbed on a busy machine
REPEATS = 300
LIMIT_US = 20.0


def resident_cache(policy: str) -> AdapterCache:
    """A cache with one adapter more than a step has, all of them in slots."""
    cache = AdapterCache(slots=ADAPTERS + 1, budget=CpuBudget(), policy=policy)
    everyone = range(1, ADAPTERS + 2)
    for adapter_id in everyone:
        cache.register(adapter_id)
        cache.start_loading(adapter_id)
        cache.finish_loading(adapter_id, 1 << 20, evict=False)
    cache.begin_step(everyone)
    return cache


def microseconds(cache: AdapterCache, steps: Sequence[Iterable[int]]) -> float:
    """Least time of a step, over repeats of a hundred steps that take turns."""

    def run() -> None:
        for turn in range(STEPS):
            cache.begin_step(steps[turn % len(steps)])

    return min(timeit.repeat(run, number=1, repeat=REPEATS)) / STEPS * 1e6


def main() -> None:
    """Prints the table."""
    first = list(range(1, ADAPTERS + 1))
    second = list(range(2, ADAPTERS + 2))
    cases: dict[str, Sequence[Iterable[int]]] = {
        "same, as list": [first],
        "same, as frozenset": [frozenset(first)],
        "other, as list": [first, second],
    }
    print(f"{ADAPTERS} adapters a step, all in slots; microseconds a step (limit {LIMIT_US:g})")
    print("policy  " + "  ".join(cases))
    for policy in policy_names():
        times = [microseconds(resident_cache(policy), steps) for steps in cases.values()]
        cells = [f"{time:.2f}".rjust(len(case)) for case, time in zip(cases, times, strict=True)]
        print(policy.ljust(6) + "  " + "  ".join(cells))


if __name__ == "__main__":
    main()
