"""A layer's call that other kernels compute for other numbers of rows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.launches.prepared import Prepared
from multilora_kernels.plan import PlanLayout


class PreparedByRows(Prepared):
    """Passes each batch to the call for its number of rows.

    A captured graph keeps the call of the rows that it was captured with, as it keeps their number.

    Args:
        layout: The layout of the plans to come.
        bounds: Ascending; the largest number of rows of each call but the last.
        calls: One more than there are bounds.
    """

    def __init__(
        self, layout: PlanLayout, bounds: Sequence[int], calls: Sequence[Prepared]
    ) -> None:
        super().__init__(layout)
        if len(calls) != len(bounds) + 1:
            raise ValueError(f"{len(bounds)} bounds need one more call, found {len(calls)}")
        self._bounds, self._calls = tuple(bounds), tuple(calls)

    def run(
        self,
        out: torch.Tensor,
        given: torch.Tensor,
        plan: torch.Tensor,
        header: npt.NDArray[np.int32],
    ) -> None:
        call = self._calls[bisect_left(self._bounds, out.size(-2))]
        if not call.run_again(out, given, plan):
            call.run(out, given, plan, header)
