"""A step's tokens sorted by slot, as plain lists: what kernels read that know no tiles.

Mixture-of-experts kernels, and those that a start may choose in place of this package's, take a
batch in this form::

    token       0  1  2  3  4  5         by_slot   3 | 0  2 | 1  4  5      (row -> token)
    token_slot  1  0  1 -1  1  1         slot     -1   0      1
                                         length    1   ...
                                         start     0   1  ...

It lies behind the plan in the same buffer, so that one copy brings both to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class SlotRuns:
    """Where each part of the slot runs lies in a plan's buffer.

    Attributes:
        begin: Where the first part begins.
        max_tokens: The largest number of tokens a step may have.
        max_loras: Number of adapter slots.
    """

    begin: int
    max_tokens: int
    max_loras: int

    @cached_property
    def slot(self) -> slice:
        """int32 [max_loras + 1]: slots that have tokens, ascending; -1 behind them."""
        return slice(self.begin, self.begin + self.max_loras + 1)

    @cached_property
    def length(self) -> slice:
        """int32 [max_loras + 1]: how many tokens each run has."""
        return slice(self.slot.stop, self.slot.stop + self.max_loras + 1)

    @cached_property
    def start(self) -> slice:
        """int32 [max_loras + 2]: where each run begins in `by_slot`, and where the last ends."""
        return slice(self.length.stop, self.length.stop + self.max_loras + 2)

    @cached_property
    def token_slot(self) -> slice:
        """int32 [max_tokens]: the slot of each token; -1 for none."""
        return slice(self.start.stop, self.start.stop + self.max_tokens)

    @cached_property
    def by_slot(self) -> slice:
        """int32 [max_tokens]: tokens in ascending order of their slots."""
        return slice(self.token_slot.stop, self.token_slot.stop + self.max_tokens)

    def write(
        self,
        ints: npt.NDArray[np.int32],
        token_slots: npt.NDArray[np.integer],
        by_slot: npt.NDArray[np.intp] | None,
        counts: npt.NDArray[np.intp],
    ) -> None:
        """Writes a batch's slot runs.

        Tokens past the batch get slot -1: a captured graph may look up its padding rows. A batch
        without adapters has no runs at all.

        Args:
            ints: A plan's buffer, changed in place behind the plan.
            token_slots: [tokens], the slot of each token, -1 for none.
            by_slot: [tokens], the tokens in ascending order of their slots; None: nobody has one.
            counts: [slots + 1], tokens without a slot, then those of each slot.
        """
        tokens = len(token_slots)
        slot_of_token = ints[self.token_slot]
        slot_of_token[:tokens] = token_slots
        slot_of_token[tokens:] = -1
        slots, lengths, starts = ints[self.slot], ints[self.length], ints[self.start]
        slots.fill(-1)
        lengths.fill(0)
        starts.fill(0)
        if by_slot is None:
            return
        ints[self.by_slot][:tokens] = by_slot
        present = counts.nonzero()[0]
        runs = len(present)
        slots[:runs] = present - 1
        lengths[:runs] = counts[present]
        lengths[:runs].cumsum(out=starts[1 : runs + 1])
