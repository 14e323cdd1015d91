"""A call by rows passes each batch to the kernels for its number of rows."""

import numpy as np
import pytest
import torch

from multilora_kernels import BatchPlan, PlanLayout
from multilora_kernels.launches.by_rows import PreparedByRows
from multilora_kernels.launches.prepared import Prepared

LAYOUT = PlanLayout(64, 2)


class Noting(Prepared):
    """Writes its number."""

    def __init__(self, number: int) -> None:
        super().__init__(LAYOUT)
        self.number = number

    def run(self, out, given, plan, header) -> None:
        out.fill_(self.number)


@pytest.mark.parametrize("shape", [(), (3,)], ids=["linear", "shrink"])
def test_rows_up_to_a_bound_go_to_its_call(shape):
    call = PreparedByRows(LAYOUT, [8, 32], [Noting(0), Noting(1), Noting(2)])
    plan = BatchPlan(LAYOUT)
    found = []
    for rows in (1, 8, 9, 32, 33, 64):
        plan.update(np.zeros(rows, np.int64))
        out = torch.empty(*shape, rows, 4)
        call(out, torch.empty(rows, 5), plan)
        found.append(int(out.max()))
    assert found == [0, 0, 1, 1, 2, 2]


def test_bounds_and_calls_must_fit():
    with pytest.raises(ValueError, match="2 bounds need one more call, found 2"):
        PreparedByRows(LAYOUT, [8, 32], [Noting(0), Noting(1)])
