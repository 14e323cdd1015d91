"""The states of an adapter on a worker, and the only transitions between them.

```
              start_loading      finish_loading          begin_step
  GONE ─► DISK ──────────► LOADING ──────────► CPU ◄──────────────────► GPU
            ▲   no room ◄────┤                  │     victim, clear_slots
            │                └► FAILED ─► LOADING
            └──────────────── evict ────────────┘        remove: any state ─► GONE
```
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from vllm_multilora.errors import MultiLoRAError


class Tier(enum.Enum):
    """Where weights lie ready; the values are the labels of the metrics."""

    GPU = "gpu"
    CPU = "cpu"


class AdapterState(enum.Enum):
    """What a worker has of an adapter.

    Attributes:
        DISK: Registered, ready to load; no memory used.
        LOADING: Being read, validated and packed; not usable yet.
        CPU: A packed copy in host memory.
        GPU: In a slot; the host copy is kept.
        FAILED: The last load failed; it may be loaded again.
        GONE: Not known (never registered, or removed).
    """

    DISK = "disk"
    LOADING = "loading"
    CPU = "cpu"
    GPU = "gpu"
    FAILED = "failed"
    GONE = "gone"


TRANSITIONS: dict[AdapterState, frozenset[AdapterState]] = {
    AdapterState.GONE: frozenset({AdapterState.DISK}),
    AdapterState.DISK: frozenset({AdapterState.LOADING, AdapterState.GONE}),
    AdapterState.LOADING: frozenset(
        {AdapterState.CPU, AdapterState.DISK, AdapterState.FAILED, AdapterState.GONE}
    ),
    AdapterState.CPU: frozenset({AdapterState.GPU, AdapterState.DISK, AdapterState.GONE}),
    AdapterState.GPU: frozenset({AdapterState.CPU, AdapterState.GONE}),
    AdapterState.FAILED: frozenset({AdapterState.LOADING, AdapterState.GONE}),
}
"""From each state, the states that may follow."""


class IllegalTransitionError(MultiLoRAError, RuntimeError):
    """An adapter was to go where its state does not lead; a fault of the caller."""

    def __init__(
        self,
        adapter_id: int,
        found: AdapterState,
        wanted: AdapterState,
        expected: Iterable[AdapterState],
    ):
        states = " or ".join(sorted(state.value for state in expected))
        super().__init__(
            f"adapter {adapter_id} cannot become {wanted.value}: its state is {found.value}, "
            f"expected {states}"
        )
        self.adapter_id = adapter_id
        self.found = found
        self.wanted = wanted


def require_transition(adapter_id: int, found: AdapterState, wanted: AdapterState) -> None:
    """Raises `IllegalTransitionError` unless `wanted` may follow `found`."""
    if wanted not in TRANSITIONS[found]:
        expected = (state for state, allowed in TRANSITIONS.items() if wanted in allowed)
        raise IllegalTransitionError(adapter_id, found, wanted, expected)
