"""Numbers of a step's rows, written on the host and read on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.batch.staging import StagingRing


class StagedRows:
    """A tensor that keeps its address and gets new values by one asynchronous copy.

    Attributes:
        buffer: [rows] on the device. Rows past a step's values keep older ones, at first
            zeros: captured graphs read padding rows as well, and must find valid numbers there.
    """

    def __init__(self, rows: int, ring: StagingRing, dtype: torch.dtype = torch.int64) -> None:
        self._ints = dtype.itemsize // 4  # of a row
        self._staging = ring.take(rows * self._ints)
        self.buffer = self._staging.tensor.view(dtype)
        self._count = 0

    @property
    def rows(self) -> torch.Tensor:
        """The values of the last step."""
        return self.buffer[: self._count]

    def update(self, values: npt.NDArray[np.integer]) -> None:
        """Replaces the first `len(values)` rows, in the order of the current stream."""
        self._staging.open().view(f"i{4 * self._ints}")[: len(values)] = values
        self._count = len(values)
        self._staging.send(self._count * self._ints)

    def clear(self) -> None:
        """Makes all rows zeros again, as they are at first: their memory was lost."""
        self.buffer.zero_()


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
        ring = StagingRing(torch.zeros(rows, dtype=torch.int32, device=tables[0].device))
        self._columns = StagedRows(rows, ring, torch.int32)

    @property
    def nbytes(self) -> int:
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
