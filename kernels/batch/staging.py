"""Host memory in which a step's numbers wait for their copy to the device.

An engine prepares the next step while the device still computes the last one, and the copies of
both are queued behind the kernels of the steps before. One host buffer would have to be empty
before the next step may be written, so preparing a step would wait for the device. Here buffers
take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

BUFFERS = 3
"""Steps whose copies may be under way at once before the host waits. Engines that schedule
asynchronously are one step ahead of the device; one buffer more is for a step that copies twice."""

ALIGNMENT = 16
"""Parts begin at a multiple of this many values, where wide loads may begin."""


def copy_event(device: torch.device) -> Any:
    """Tells when a copy has left its buffer, as `torch.cuda.Event`; None: as soon as it is made."""
    return torch.cuda.Event() if device.type == "cuda" else None


class StagingRing:
    """Host buffers that take turns in feeding one tensor, by asynchronous copies.

    Args:
        target: of shape [size], keeps its address. In host memory it is its own only buffer.
    """

    def __init__(self, target: torch.Tensor) -> None:
        kind, pinned = target.dtype, target.device.type == "cuda"
        self._target, self._is_host = target, target.device.type == "cpu"
        self._buffers = [
            target if self._is_host else torch.zeros(target.shape, dtype=kind, pin_memory=pinned)
            for _ in range(1 if self._is_host else BUFFERS)
        ]
        self._values = [buffer.numpy() for buffer in self._buffers]
        self._copied = [copy_event(target.device) for _ in self._buffers]
        self._turn = self._taken = 0
        self._is_open = self._gathers = False
        self._sent: list[int] = []

    def take(self, size: int) -> StagedPart:
        """The next part of the tensor, with less than `ALIGNMENT` values unused before it."""
        begin = -(-self._taken // ALIGNMENT) * ALIGNMENT
        self._taken = begin + size
        return StagedPart(self, self._target[begin : begin + size], begin)

    def open(self) -> npt.NDArray[Any]:
        """The values of the buffer whose turn it is, to be written before `send`.

        They are those of an earlier step. Waits only where that step's copy has not left yet.
        """
        if not (self._gathers and self._is_open):
            self._turn = (self._turn + 1) % len(self._buffers)
            if (copied := self._copied[self._turn]) is not None:
                copied.synchronize()
            self._is_open = True
        return self._values[self._turn]

    def send(self, end: int, begin: int = 0) -> None:
        """Queues the copy of values `begin` to `end` on the current stream, and of nothing else."""
        if self._gathers:
            self._sent += begin, end
        elif not self._is_host:
            buffer, copied = self._buffers[self._turn], self._copied[self._turn]
            self._target[begin:end].copy_(buffer[begin:end], non_blocking=True)
            if copied is not None:
                copied.record()

    @contextmanager
    def one_copy(self) -> Iterator[None]:
        """Within it all is written to one buffer; one copy at its end brings whatever was sent.

        What lies between gets the values that an earlier step had there.
        """
        self._is_open, self._gathers, self._sent = False, True, []
        try:
            yield
        finally:
            self._gathers = False
        if self._sent:
            self.send(max(self._sent), min(self._sent))


@dataclass(frozen=True)
class StagedPart:
    """A part of a ring's tensor, which is written and sent as if it were one of its own."""

    ring: StagingRing
    tensor: torch.Tensor
    begin: int

    def open(self) -> npt.NDArray[Any]:
        return self.ring.open()[self.begin : self.begin + len(self.tensor)]

    def send(self, count: int) -> None:
        self.ring.send(self.begin + count, self.begin)
