"""A step's tokens sorted by slot, as plain lists: what kernels read that know no tiles.

Mixture-of-experts kernels, and those that a start may choose in place of this package's, take a
batch in this form::

    token        0  1  2  3  4  5        by_slot     3 | 0  2 | 1  4  5     (row -> token)
    slot         1  0  1 -1  1  1        run_slot   -1   0      1
                                         run_length  1   1 ...
                                         run_start   0   1 ...

It lies behind the plan in the same buffer, so that one copy brings both to the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from multilora_kernels.plan import PlanLayout


def write_slot_runs(
    ints: npt.NDArray[np.int32],
    layout: PlanLayout,
    token_slots: npt.NDArray[np.integer],
    by_slot: npt.NDArray[np.intp] | None,
    counts: npt.NDArray[np.intp],
) -> None:
    """Writes a batch's slot runs into a plan's buffer.

    Tokens past the batch get slot -1: a captured graph may look up its padding rows. A batch
    without adapters has no runs at all.

    Args:
        ints: int32 [layout.size]; changed in place behind the plan.
        layout: With `slot_runs`.
        token_slots: [tokens], the slot of each token, -1 for none.
        by_slot: [tokens], the tokens in ascending order of their slots; None: nobody has one.
        counts: [slots + 1], tokens without a slot, then those of each slot.
    """
    tokens = len(token_slots)
    slot_of_token = ints[layout.token_slot]
    slot_of_token[:tokens] = token_slots
    slot_of_token[tokens:] = -1
    parts = layout.run_slot, layout.run_length, layout.run_start
    slots, lengths, starts = (ints[part] for part in parts)
    slots.fill(-1)
    lengths.fill(0)
    starts.fill(0)
    if by_slot is None:
        return
    ints[layout.by_slot][:tokens] = by_slot
    present = counts.nonzero()[0]
    runs = len(present)
    slots[:runs] = present - 1
    lengths[:runs] = counts[present]
    lengths[:runs].cumsum(out=starts[1 : runs + 1])
