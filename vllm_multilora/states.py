"""The states of an adapter, and what leads from one to another.

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

NEAREST_FIRST = (
    AdapterState.SLOT,
    AdapterState.HOST,
    AdapterState.READING,
    AdapterState.QUEUED,
    AdapterState.ABSENT,
    AdapterState.FAILED,
    AdapterState.QUARANTINED,
)
"""How near an adapter is to serving."""
