"""Host memory in which a step's numbers wait for their copy to the device.

An engine prepares the next step while the device still computes the last one, and the copies of
both are queued behind the kernels of the steps before. One host buffer would have to be empty
before the next step may be written, so preparing a step would wait for the device. Here buffers
take turns.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt
import torch

BUFFERS = 3
"""Steps whose copies may be under way at once before the host waits. Engines that schedule
asynchronously are one step ahead of the device; one buffer more is for a step that copies twice."""


class CopyEvent(Protocol):
    """What tells when a copy has left its buffer; `torch.cuda.Event` is one."""

    def record(self) -> Any:
        """Marks this point of the current stream."""

    def synchronize(self) -> Any:
        """Waits for the point that was marked last; returns at once if none was, or it is past."""


def copy_event(device: torch.device) -> CopyEvent | None:
    """For a buffer that is copied to a device; None: its copies are over when they are made."""
    return torch.cuda.Event() if device.type == "cuda" else None


class StagingRing:
    """Host buffers that take turns in feeding one tensor, by asynchronous copies.

    Args:
        target: of shape [size], on a device; keeps its address.
    """

    def __init__(self, target: torch.Tensor) -> None:
        pinned = target.device.type == "cuda"
        self._target = target
        self._buffers = [
            torch.zeros(target.shape, dtype=target.dtype, pin_memory=pinned) for _ in range(BUFFERS)
        ]
        self._values = [buffer.numpy() for buffer in self._buffers]
        self._copied = [copy_event(target.device) for _ in range(BUFFERS)]
        self._turn = 0

    def open(self) -> npt.NDArray[Any]:
        """The values of the buffer whose turn it is, to be written before `send`.

        They are those of an earlier step. Waits only where that step's copy has not left yet.
        """
        self._turn = (self._turn + 1) % BUFFERS
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        return self._values[self._turn]

    def send(self, count: int) -> None:
        """Queues the copy of the first `count` values of what `open` gave, on the current stream.

        Nothing behind them changes on the device.
        """
        buffer, copied = self._buffers[self._turn], self._copied[self._turn]
        self._target[:count].copy_(buffer[:count], non_blocking=True)
        if copied is not None:
            copied.record()
