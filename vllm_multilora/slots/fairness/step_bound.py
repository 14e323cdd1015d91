"""How much those who are ahead may add to a step, by how long steps take.

Everybody in a step waits for all of it: the tokens of somebody who asks for little come as slowly
as the step is large. What may be added to such a step is not known beforehand: a GPU computes
hundreds of tokens in the time in which it reads the model, and a CPU a handful. So it is found out
while requests are served. One step in `PROBE_STEPS` is left to the others alone, which says how
long it takes them. What is added to the rest is compared with that: it grows while steps are short
enough, and shrinks three times as fast, so that three steps of four are.

Three numbers, one comparison a step: no model of the hardware, whose prices depend on the batch.
"""

from __future__ import annotations

import statistics
from collections import deque

PROBE_STEPS = 16
"""One of so many steps is without those who are ahead."""

REMEMBERED = 8
"""Such steps of which the median is what the others take alone."""

GROWTH = 1.02
FIRST_SHARE = 1 / 32
"""Share of a step's tokens before anything is known."""


class StepBound:
    """What those who are ahead may have of the next step, as a cost.

    Args:
        slowdown: How many times as long as without them a step may take, above 1.
        most: Tokens of a step.

    Attributes:
        allowance: What they may have, if they may have any.
    """

    def __init__(self, slowdown: float, most: int) -> None:
        self.allowance = max(1.0, most * FIRST_SHARE)
        self._slowdown = slowdown
        self._most = float(most)
        self._alone: deque[float] = deque(maxlen=REMEMBERED)
        self._steps = 0

    def next(self, least: float) -> float:
        """What they may have of a step: `least` however long it takes, except in a probe."""
        is_probe = self._steps % PROBE_STEPS == 0
        self._steps += 1
        return 0.0 if is_probe else max(self.allowance, least)

    def took(self, seconds: float, added: float) -> None:
        """A step of others who generated, and had no prompts, took so long; so much was `added`."""
        if not added:
            self._alone.append(seconds)
        elif self._alone:
            is_short = seconds <= self._slowdown * statistics.median(self._alone)
            if is_short and added > self.allowance / 2:  # else it says nothing of more
                self.allowance = min(self._most, self.allowance * GROWTH)
            elif not is_short and added <= self.allowance:
                self.allowance = max(1.0, self.allowance / GROWTH**3)
