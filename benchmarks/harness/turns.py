"""Paired timing: what is compared takes turns, so that a machine's drift hits all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping


def paired(acts: Mapping[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """What acts take, turn by turn; one round before counts not."""
    found = []
    for number in range(rounds + 1):
        order = list(acts) if number % 2 else list(acts)[::-1]
        found.append({name: acts[name]() for name in order})
        print(
            f"round {number}: {found[-1]}" if number else "warmed up", file=sys.stderr, flush=True
        )
    return found[1:]
