"""How long a step waits for copies of adapters into slots."""

from __future__ import annotations

from vllm_multilora.slots.budget import MIB

STEP_S = 0.002
"""Of one step, for all of its copies together; the system rounds waits up to milliseconds."""

SMALL_BYTES = 4 * MIB
"""The largest adapters that are waited for: a processor copies them in less than a millisecond."""


class CopyWaits:
    """What a step may still wait, so that requests whose adapters are copied soon are in it.

    Without the wait such a request runs a step later, which takes ten times as long or more. All
    others' tokens come later by the wait, which is short and has an end.

    Args:
        step_s: Seconds of each step.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = self._left_s = step_s

    def begin_step(self) -> None:
        """Another step is scheduled from now on."""
        self._left_s = self._step_s

    def left(self, size: int) -> float:
        """Seconds that may be waited for an adapter of so many bytes; 0: no wait."""
        return self._left_s if size <= SMALL_BYTES else 0.0

    def spend(self, seconds: float) -> None:
        """So many have been waited."""
        self._left_s = max(0.0, self._left_s - seconds)
