"""Ranks and marks of a slot are written on the device without new memory there."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.packs.test_staging import Slow

pytestmark = pytest.mark.serving


@pytest.fixture(autouse=True)
def _events(monkeypatch):
    monkeypatch.setattr(Slow, "made", [], raising=False)


class Copies(TorchDispatchMode):
    """Copies between devices, and operators that make tensors on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.across: list[bool] = []
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self.across.append(args[0].is_contiguous() and args[1].is_contiguous())
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for each in result if isinstance(result, tuple | list) else [result]:
            if each.device.type == "meta" and each.untyped_storage()._cdata not in given:
                self.made.append(str(func))
        return result


def test_columns_arrive_in_their_tables_and_nowhere_else():
    from vllm_multilora.integration.step.staged_rows import SlotColumns

    tables = [torch.zeros(rows, 3, dtype=torch.int32) for rows in (2, 4)]
    SlotColumns(tables).write(1, np.array([5, 6], np.int32), np.array([1, 2, 3, 4], np.int32))
    assert tables[0].tolist() == [[0, 5, 0], [0, 6, 0]]
    assert tables[1][:, 1].tolist() == [1, 2, 3, 4]
    assert not tables[1][:, [0, 2]].any()


def test_a_column_crosses_to_the_device_in_one_piece_and_needs_no_memory_there(monkeypatch):
    """PyTorch copies across devices into what is not contiguous by way of a new tensor."""
    from vllm_multilora.integration.step.staged_rows import SlotColumns

    tables = [torch.zeros(3, 2, dtype=torch.int32, device="meta") for _ in range(2)]
    monkeypatch.setattr("multilora_kernels.batch.staging.copy_event", lambda _: Slow())
    columns = SlotColumns(tables)
    with Copies() as copies:
        for slot in (0, 1, 0):
            columns.write(slot, np.ones(3, np.int32), np.ones(3, np.int32))
    assert copies.across == [True] * 3
    assert copies.made == []
    assert sum(event.recorded for event in Slow.made) == 3
    with Copies() as copies:  # what it is for
        tables[0][:, 1].copy_(torch.ones(3, dtype=torch.int32))
    assert copies.across == [False]
