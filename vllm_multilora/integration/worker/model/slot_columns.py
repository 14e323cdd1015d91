"""Columns of small tables on the device, one per slot, written while a server serves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_multilora.integration.step.staged_rows import StagedRows


class SlotColumns:
    """Writes a slot's column in several int32 tables, through memory that is allocated once.

    PyTorch copies from host memory to a column, which is not contiguous, by way of a new tensor on
    the device; a server has given all the device's memory away by then. For one thread at a time.

    Args:
        tables: int32 [rows, slots] each, on one device.
    """

    def __init__(self, tables: Sequence[torch.Tensor]) -> None:
        self._tables = tuple(tables)
        rows = sum(len(table) for table in tables)
        self._columns = StagedRows(rows, tables[0].device, torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._columns.buffer.nbytes

    def write(self, slot: int, *columns: npt.NDArray[np.int32]) -> None:
        """Writes a column of each table, in the order of the current stream.

        Args:
            slot: The slot.
            columns: [rows] for each table.
        """
        self._columns.update(np.concatenate(columns))
        parts = self._columns.buffer.split([len(table) for table in self._tables])
        for table, part in zip(self._tables, parts, strict=True):
            table[:, slot].copy_(part)
