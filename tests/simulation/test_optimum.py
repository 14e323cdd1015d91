"""Belady's bound, against all possible choices."""

import itertools
import random
from functools import cache

import pytest

from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.simulation.replay import most_adapters, optimal_hits


def best_of_all_choices(requests: str, capacity: int) -> int:
    @cache
    def hits(position: int, cached: frozenset[str]) -> int:
        if position == len(requests):
            return 0
        requested = requests[position]
        if requested in cached:
            return 1 + hits(position + 1, cached)
        if len(cached) < capacity:
            return hits(position + 1, cached | {requested})
        return max(hits(position + 1, cached - {gone} | {requested}) for gone in cached)

    return hits(0, frozenset())


@pytest.mark.parametrize(
    ("seed", "capacity"), list(itertools.product(range(10), [1, 2, 3])), ids=str
)
def test_no_choice_of_victims_has_more_hits(seed, capacity):
    requests = "".join(random.Random(seed).choices("abcde", k=14))
    assert optimal_hits(requests, capacity) == best_of_all_choices(requests, capacity)


def test_the_example_of_the_textbooks():
    """Silberschatz, Operating System Concepts: three frames, nine faults of twenty."""
    assert optimal_hits("70120304230321201701", 3) == 20 - 9


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (CpuBudget(), 4),
        (CpuBudget(adapters=3), 3),
        (CpuBudget(bytes=6), 3),
        (CpuBudget(adapters=2, bytes=6), 2),
        (CpuBudget(bytes=5), 2),
    ],
    ids=str,
)
def test_most_adapters_are_the_smallest_ones(budget, expected):
    assert most_adapters(budget, [9, 3, 1, 2]) == expected
