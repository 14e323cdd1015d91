"""Activations as the kernels are compiled for them: every row begins at a multiple of 16 elements.

Triton compiles a kernel anew for a tensor that does not begin at a multiple of 16 bytes, and for
row strides that are no multiples of 16 elements, are 1 or need 64 bits. A model's activations
hardly ever do. What does is copied, so that a layer has one kernel for all batches of a range: it
is there before anyone is served, whatever comes then, and moves 16 bytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_GRAIN = 16  # elements of a row; bytes of an address
_STRIDE_BITS = 31


def row_step(rows: torch.Tensor) -> int:
    """Elements from row to row of [T, W]; 0 for a single one, whatever its stride says."""
    return rows.stride(0) if rows.size(0) > 1 else 0


def fits(bits: int, steps: int) -> bool:
    """Whether the kernels take activations as they are.

    Args:
        bits: All that must be a multiple of 16, joined by `|`: addresses, steps, first columns.
        steps: All steps from row to row, likewise.
    """
    return not (bits % _GRAIN or steps >> _STRIDE_BITS)


def is_aligned(rows: torch.Tensor, first_column: int = 0) -> bool:
    """Whether the kernels take [T, W] as it is, from a column on."""
    step = row_step(rows)
    return fits(rows.data_ptr() | step | first_column, step)


def aligned_copy(rows: torch.Tensor) -> torch.Tensor:
    """A copy of [T, W] that the kernels take."""
    count, width = rows.shape
    memory = torch.empty(count, -(-width // _GRAIN) * _GRAIN, dtype=rows.dtype, device=rows.device)
    return memory[:, :width].copy_(rows)


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """The rows themselves if the kernels take them as they are, or else a copy."""
    return rows if is_aligned(rows) else aligned_copy(rows)


@contextmanager
def aligned_output(y: torch.Tensor, first_column: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Where kernels are to change the columns of y from one on, and which column that is there.

    The column depends on `first_column` alone. If it is a copy, y gets what it holds in the end.
    """
    if is_aligned(y, first_column):
        yield y, first_column
        return
    first = 0 if first_column % _GRAIN else first_column
    span = y[:, first_column - first :]
    own = aligned_copy(span)
    yield own, first
    span.copy_(own)


def aligned_h(h: torch.Tensor) -> torch.Tensor:
    """Itself if it is contiguous [slices, T, R] at a multiple of 16 bytes, or else a copy."""
    if h.is_contiguous() and h.data_ptr() % _GRAIN == 0:
        return h
    return torch.empty(h.shape, dtype=h.dtype, device=h.device).copy_(h)
