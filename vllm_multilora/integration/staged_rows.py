"""Numbers of a step's rows, written on the host and read on the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


class StagedRows:
    """An int64 tensor that keeps its address and gets a step's values by one asynchronous copy.

    Attributes:
        buffer: int64 [rows] on the device. Rows past a step's values keep older ones, at first
            zeros: captured graphs read padding rows as well, and must find valid numbers there.
    """

    def __init__(self, rows: int, device: torch.device | str) -> None:
        device = torch.device(device)
        self._host = torch.zeros(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._values = self._host.numpy()
        self.buffer = self._host if device.type == "cpu" else self._host.to(device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def update(self, values: npt.NDArray[np.int64]) -> None:
        """Replaces the first `len(values)` rows, in the order of the current stream."""
        count = len(values)
        if self._copied is not None:
            # The host may be a step ahead of the device: the last values must have left first.
            self._copied.synchronize()
        self._values[:count] = values
        if self.buffer is not self._host:
            self.buffer[:count].copy_(self._host[:count], non_blocking=True)
            if self._copied is not None:
                self._copied.record()
