"""The states of an adapter, and the only transitions between them.

One state machine for everybody that shows or decides: the store moves an adapter up to HOST, the
engine core between HOST and SLOT; status and metrics show what these two say.

```
                 want          a place is free       packed             copied
  ABSENT ─────────────► QUEUED ───────────────► READING ─────► HOST ◄──────────► SLOT
    ▲ ▲ ▲    no room, cancelled │ cancelled │ kept: no       │ evicted     victim │
    │ │ └───────────────────────┴───────────┴────────────────┘                    │
    │ │                         any error ──► FAILED ──► QUEUED, ABSENT           │
    │ └─────────────── its host copy is gone ─────────────────────────────────────┤
    └──── withdrawn, read again ── QUARANTINED ◄── its numbers were not finite ───┘
```
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from vllm_multilora.errors import MultiLoRAError


class AdapterState(enum.Enum):
    """What is there of an adapter; the values are labels of metrics and of status.

    Attributes:
        ABSENT: Nothing is in memory; known or not, it may be asked for.
        QUEUED: Asked for; its files have not been opened yet.
        READING: Its files are being opened, checked and packed.
        HOST: Packed in host memory.
        SLOT: In a slot. The host copy is kept as long as there is room for it.
        FAILED: The last load failed; it may be asked for again.
        QUARANTINED: It made numbers that are not finite; it serves nobody until it is withdrawn.
    """

    ABSENT = "absent"
    QUEUED = "queued"
    READING = "reading"
    HOST = "host"
    SLOT = "slot"
    FAILED = "failed"
    QUARANTINED = "quarantined"


AT_HAND = (AdapterState.HOST, AdapterState.SLOT)
"""In which an adapter need not be read."""

TRANSITIONS: dict[AdapterState, frozenset[AdapterState]] = {
    # A load of files that are in host memory already, under another name, is over at once.
    AdapterState.ABSENT: frozenset({AdapterState.QUEUED, AdapterState.HOST}),
    AdapterState.QUEUED: frozenset(
        {AdapterState.READING, AdapterState.FAILED, AdapterState.ABSENT}
    ),
    AdapterState.READING: frozenset(
        {AdapterState.HOST, AdapterState.FAILED, AdapterState.ABSENT, AdapterState.QUEUED}
    ),
    AdapterState.HOST: frozenset(
        {AdapterState.SLOT, AdapterState.ABSENT, AdapterState.FAILED, AdapterState.QUARANTINED}
    ),
    AdapterState.SLOT: frozenset(
        {AdapterState.HOST, AdapterState.ABSENT, AdapterState.FAILED, AdapterState.QUARANTINED}
    ),
    AdapterState.FAILED: frozenset({AdapterState.QUEUED, AdapterState.ABSENT}),
    AdapterState.QUARANTINED: frozenset({AdapterState.ABSENT}),
}
"""From each state, the states that may follow."""


class IllegalTransitionError(MultiLoRAError, RuntimeError):
    """An adapter was to go where its state does not lead; a fault of the caller."""

    def __init__(
        self,
        adapter: int,
        found: AdapterState,
        wanted: AdapterState,
        expected: Iterable[AdapterState],
    ):
        states = " or ".join(sorted(state.value for state in expected))
        super().__init__(
            f"adapter {adapter} cannot become {wanted.value}: its state is {found.value}, "
            f"expected {states}"
        )
        self.adapter = adapter
        self.found = found
        self.wanted = wanted


def require_transition(adapter: int, found: AdapterState, wanted: AdapterState) -> None:
    """Raises `IllegalTransitionError` unless `wanted` may follow `found`."""
    if wanted not in TRANSITIONS[found]:
        expected = (state for state, allowed in TRANSITIONS.items() if wanted in allowed)
        raise IllegalTransitionError(adapter, found, wanted, expected)
