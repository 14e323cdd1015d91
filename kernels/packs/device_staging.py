"""Copies pieces from host memory to a GPU through a fixed buffer in its memory.

The buffer has two halves, used in turn: while a kernel spreads one group from the first, the next
group arrives in the second. All memory is taken when the buffer is made, since a server has given
away all the rest by the time that adapters come.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.packs.pieces import MAX_PIECES, host_bytes, registered_parts

SEGMENT_ALIGNMENT = 4096
"""Host memory may be several mappings: each begins at a multiple of this."""

_ALIGNMENT = 64
_FIELDS = 5
_TABLE_BYTES = MAX_PIECES * _FIELDS * 8


class DeviceStaging:
    """The buffer; used by one thread at a time, on any streams.

    Args:
        device: The GPU; a CPU for Triton's interpreter.
        staging_bytes: Of both halves.
    """

    def __init__(self, device: torch.device, staging_bytes: int) -> None:
        half = staging_bytes // 2 // _ALIGNMENT * _ALIGNMENT
        self._capacity = half - _TABLE_BYTES
        if self._capacity <= 0:
            raise ValueError(
                f"staging needs more than {2 * _TABLE_BYTES} bytes for its tables, found "
                f"{staging_bytes}"
            )
        on_gpu = device.type == "cuda"
        self._halves = [torch.empty(half, dtype=torch.uint8, device=device) for _ in range(2)]
        self._tables = [
            torch.empty(MAX_PIECES, _FIELDS, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)
        ]
        # Who fills slots has time, and leaves the processor to others while it waits.
        self._used = [torch.cuda.Event(blocking=True) for _ in range(2)] if on_gpu else []
        self._turn = 0

    def copy(self, pieces: npt.NDArray[np.void]) -> None:
        """Queues the copy of a group on the current stream.

        Waits until the half before the last one has been used up, so that a caller is never more
        than two groups ahead of the GPU.

        Args:
            pieces: [n] of `multilora_kernels.packs.pieces.PIECE`, at least one, at most
            `MAX_PIECES`.

        Raises:
            ValueError: They do not fit a half of the buffer.
        """
        from multilora_kernels.triton.spread import in_units, scatter_launch

        offsets, runs, end = _arranged(pieces)
        if len(pieces) > MAX_PIECES or end > self._capacity:
            raise ValueError(
                f"a group of {len(pieces)} pieces and {end} bytes does not fit the staging memory, "
                f"which takes {MAX_PIECES} pieces and {self._capacity} bytes"
            )
        turn, self._turn = self._turn, 1 - self._turn
        half, host_table = self._halves[turn], self._tables[turn]
        if self._used:
            self._used[turn].synchronize()
        unit, units = in_units(pieces, offsets)
        host_table[: len(units)].copy_(torch.from_numpy(units))
        table = half[self._capacity :].view(torch.int64).view(MAX_PIECES, _FIELDS)
        table = table[: len(units)]
        table.copy_(host_table[: len(units)], non_blocking=True)
        for address, offset, size in runs:
            for begin, part in registered_parts(address, size):
                at = offset + begin - address
                half[at : at + part].copy_(host_bytes(begin, part), non_blocking=True)
        longest = int((units[:, 2] * units[:, 3]).max())
        scatter_launch(half[: self._capacity], table, unit, longest).run()
        if self._used:
            self._used[turn].record()

    def warm_up(self) -> None:
        """Compiles the kernel for every width in which it copies."""
        from multilora_kernels.triton.spread import UNITS, scatter_launch

        table = self._halves[0][self._capacity :].view(torch.int64).view(MAX_PIECES, _FIELDS)
        table[:1].zero_()
        for unit in UNITS:
            scatter_launch(self._halves[0][: self._capacity], table[:1], unit).run()


def _arranged(
    pieces: npt.NDArray[np.void],
) -> tuple[npt.NDArray[np.int64], list[tuple[int, int, int]], int]:
    """Where pieces go in the buffer: what lies together in host memory stays together.

    Returns:
        The offset of each piece; (address, offset, bytes) of each run that is copied in one go; and
        the end of the last.
    """
    sizes = pieces["rows"] * pieces["row_bytes"]
    order = np.argsort(pieces["source"], kind="stable")
    begin = pieces["source"][order]
    end = np.maximum.accumulate(begin + sizes[order])
    # Between blocks of an adapter lies less than a line, which may as well be copied. What begins a
    # segment is copied apart: CUDA does not copy across memory that was registered in two parts.
    starts = np.ones(len(pieces), np.bool_)
    starts[1:] = (begin[1:] >= end[:-1] + _ALIGNMENT) | (begin[1:] % SEGMENT_ALIGNMENT == 0)
    offsets = np.empty(len(pieces), np.int64)
    runs = []
    at = 0
    first = np.flatnonzero(starts)
    for i, j in zip(first.tolist(), [*first[1:].tolist(), len(pieces)], strict=True):
        address = int(begin[i])
        size = int((begin[i:j] + sizes[order[i:j]]).max()) - address
        at += (address - at) % _ALIGNMENT  # aligned as it is in host memory
        offsets[order[i:j]] = begin[i:j] - address + at
        runs.append((address, at, size))
        at += size
    return offsets, runs, at
