"""Host time that slots take of an engine step when every adapter has one.

    python benchmarks/slots_step.py

`same`: the step has the adapters of the step before, as most decoding steps do. `other`: one
adapter in 64 differs, so that the policy is told and look-ups are counted. Minimum over repeats,
microseconds a step.
"""

from __future__ import annotations

import timeit
from collections.abc import Sequence

from vllm_multilora.slots.assignment import SlotAssignment
from vllm_multilora.slots.registry import make_policy, policy_names

ADAPTERS = 64
STEPS = 100  # short runs, so that some are undisturbed on a busy machine
REPEATS = 300
LIMIT_US = 20.0


def filled_slots(policy: str) -> SlotAssignment:
    """Slots with one adapter more than a step has."""
    slots = SlotAssignment(ADAPTERS + 1, make_policy(policy))
    for adapter_id in range(1, ADAPTERS + 2):
        assignment = slots.assign(adapter_id, pack=1)
        assert assignment is not None
        slots.filled(assignment.order)
    return slots


def microseconds(slots: SlotAssignment, steps: Sequence[frozenset[int]]) -> float:
    """Least time of a step, over repeats of a hundred steps that take turns."""

    def run() -> None:
        for turn in range(STEPS):
            slots.running(steps[turn % len(steps)])

    return min(timeit.repeat(run, number=1, repeat=REPEATS)) / STEPS * 1e6


def main() -> None:
    """Prints the table."""
    first = frozenset(range(1, ADAPTERS + 1))
    second = frozenset(range(2, ADAPTERS + 2))
    cases: dict[str, Sequence[frozenset[int]]] = {"same": [first], "other": [first, second]}
    print(f"{ADAPTERS} adapters a step, all in slots; microseconds a step (limit {LIMIT_US:g})")
    print("policy  " + "  ".join(case.rjust(5) for case in cases))
    for policy in policy_names():
        times = [microseconds(filled_slots(policy), steps) for steps in cases.values()]
        print(policy.ljust(6) + "  " + "  ".join(f"{time:.2f}".rjust(5) for time in times))


if __name__ == "__main__":
    main()
