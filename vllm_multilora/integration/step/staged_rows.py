"""Numbers of a step's rows, written on the host and read on the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.batch.staging import StagingRing


class StagedRows:
    """A tensor that keeps its address and gets new values by one asynchronous copy.

    Args:
        rows: The most rows of a step.
        device: Where they are read.
        dtype: Of the values.

    Attributes:
        buffer: [rows] on the device. Rows past a step's values keep older ones, at first
            zeros: captured graphs read padding rows as well, and must find valid numbers there.
    """

    def __init__(
        self, rows: int, device: torch.device | str, dtype: torch.dtype = torch.int64
    ) -> None:
        self.buffer = torch.zeros(rows, dtype=dtype, device=device)
        on_host = self.buffer.device.type == "cpu"
        self._staging = None if on_host else StagingRing(self.buffer)

    def update(self, values: npt.NDArray[np.integer]) -> None:
        """Replaces the first `len(values)` rows, in the order of the current stream."""
        count = len(values)
        if self._staging is None:
            self.buffer.numpy()[:count] = values
            return
        self._staging.open()[:count] = values
        self._staging.send(count)

    def clear(self) -> None:
        """Makes all rows zeros again, as they are at first: their memory was lost."""
        self.buffer.zero_()
