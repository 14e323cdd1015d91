"""Zeros past the true ranks of slots that vLLM's kernels read: these multiply by all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class SlotWeights:
    """The slots of one slice of a layer.

    Attributes:
        a: [slots, ..., ranks, inputs]; None where nobody multiplies by it.
        b: [slots, ..., outputs, ranks]; None likewise.
    """

    a: torch.Tensor | None
    b: torch.Tensor | None


class SlotRests:
    """Clears what a slot's last adapter has left past the new one's ranks.

    Args:
        slices: By row in the rank tables, the slices that vLLM's kernels read.
    """

    def __init__(self, slices: Mapping[int, SlotWeights]) -> None:
        self._slices = dict(slices)

    def clear(
        self, slot: int, shrink: npt.NDArray[np.int32], expand: npt.NDArray[np.int32]
    ) -> None:
        """Clears a slot, in the order of the current stream; for slots that no step uses.

        Args:
            slot: The slot.
            shrink: [rows of the rank tables], true ranks of A.
            expand: The same of B.
        """
        rests = []
        for row, weights in self._slices.items():
            if weights.a is not None:
                rests.append(weights.a[slot][..., int(shrink[row]) :, :])
            if weights.b is not None:
                rests.append(weights.b[slot][..., int(expand[row]) :])
        rests = [rest for rest in rests if rest.numel()]
        if rests:
            torch._foreach_zero_(rests)
