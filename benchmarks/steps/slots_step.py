"""Host time that slots take of an engine step when every adapter has one.

`same`: the step has the adapters of the step before, as most decoding steps do. `other`: one
adapter in 64 differs, so that the policy is told and look-ups are counted. Minimum over repeats,
microseconds a step.
"""

from __future__ import annotations

import timeit
from collections.abc import Iterable, Sequence

from benchmarks.harness.registry import Figure, benchmark
from vllm_multilora.slots.assignment import SlotAssignment
from vllm_multilora.slots.policies.policy_registry import make_policy, policy_names

ADAPTERS = 64
STEPS = 100  # short runs, so that some are undisturbed on a busy machine


def filled_slots(policy: str) -> SlotAssignment:
    """Slots with one adapter more than a step has."""
    slots = SlotAssignment(ADAPTERS + 1, make_policy(policy))
    for adapter_id in range(1, ADAPTERS + 2):
        assignment = slots.assign(adapter_id, pack=1)
        assert assignment is not None
        slots.filled(assignment.order)
    return slots


def microseconds(slots: SlotAssignment, steps: Sequence[frozenset[int]], repeats: int) -> float:
    """Least time of a step, over repeats of a hundred steps that take turns."""

    def run() -> None:
        for turn in range(STEPS):
            slots.running(steps[turn % len(steps)])

    return min(timeit.repeat(run, number=1, repeat=repeats)) / STEPS * 1e6


@benchmark(
    workload="64 adapters per step, all in slots",
    control="a step with the same adapters as the previous one (`same`)",
    figure="microseconds of the engine core per step",
    compares_to="the limit, 20 µs",
    quick={"repeats": 10},
)
def slots_step(repeats: int = 300) -> Iterable[Figure]:
    """Host time that slots take of an engine step when every adapter has one."""
    first = frozenset(range(1, ADAPTERS + 1))
    second = frozenset(range(2, ADAPTERS + 2))
    cases: dict[str, Sequence[frozenset[int]]] = {"same": [first], "other": [first, second]}
    for policy in policy_names():
        for case, steps in cases.items():
            found = microseconds(filled_slots(policy), steps, repeats)
            yield Figure(policy, f"{case}, µs", [found])
