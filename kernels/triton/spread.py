"""Spreads pieces of an adapter, once they are in device memory, over a slot of every layer.

Each program copies a share of one piece. The pieces' addresses come as a table of numbers in
device memory, so that one launch reaches the tensors of all layers.
"""

# Constexpr parameters are upper-case, as is Triton's habit; Triton functions are not typed.
# ruff: noqa: N803
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from multilora_kernels.triton.launch import Launch

_MAX_LANES = 16  # programs per piece: steps' kernels wait for those that have begun
_BLOCK = 1024  # units that a program copies at a time
UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""Widths in which rows are copied, in bytes."""
_FIELDS = tl.constexpr(5)


@triton.jit
def scatter_kernel(buffer, pieces, BLOCK: tl.constexpr):
    """Copies pieces of `buffer`, in units of its element type, to where the table says.

    `pieces`, int64 [pieces, 5]: first unit in the buffer; address; rows; units of a row; units
    from row to row at the address.
    """
    entry = pieces + tl.program_id(0) * _FIELDS
    source = buffer + tl.load(entry)
    target = tl.load(entry + 1).to(buffer.dtype)
    rows = tl.load(entry + 2)
    columns = tl.load(entry + 3)
    stride = tl.load(entry + 4)
    total = rows * columns
    lane = tl.arange(0, BLOCK)
    for start in range(tl.program_id(1) * BLOCK, total, tl.num_programs(1) * BLOCK):
        at = start + lane
        live = at < total
        values = tl.load(source + at, mask=live)
        if stride == columns:
            tl.store(target + at, values, mask=live)
        else:
            row = at // columns
            tl.store(target + row * stride + (at - row * columns), values, mask=live)


def scatter_launch(
    staged: torch.Tensor, table: torch.Tensor, unit: int, longest: int = 0
) -> Launch:
    """The launch that copies pieces of a buffer, with a program for every `_BLOCK` units at most.

    Args:
        staged: uint8, in the memory of the device that the pieces' addresses belong to.
        table: int64 [n, 5], at least one piece, in the same memory; see `in_units`.
        unit: Bytes that are copied at a time, one of `UNITS`.
        longest: Units of the longest piece.
    """
    whole = staged.numel() // unit * unit
    arguments: dict[str, Any] = {
        "buffer": staged[:whole].view(UNITS[unit]),
        "pieces": table,
    }
    return Launch(
        scatter_kernel,
        (len(table), max(1, min(_MAX_LANES, triton.cdiv(longest, _BLOCK)))),
        arguments,
        {"BLOCK": _BLOCK},
        {"num_warps": 4, "num_stages": 1},
    )


def in_units(
    pieces: npt.NDArray[np.void], offsets: npt.NDArray[np.int64]
) -> tuple[int, npt.NDArray[np.int64]]:
    """The kernel's table of pieces.

    Args:
        pieces: [n] of `multilora_kernels.packs.pieces.PIECE`.
        offsets: [n], where they lie in the buffer, in bytes.

    Returns:
        The widest unit of which every row and address is a multiple; and int64 [n, 5], as
        `scatter_kernel` reads it.
    """
    table = pieces.view(np.int64).reshape(len(pieces), -1).copy()
    table[:, 0] = offsets
    bits = int(np.bitwise_or.reduce(table[:, [0, 1, 3, 4]], axis=None))
    unit = next(unit for unit in UNITS if bits % unit == 0)
    table[:, [0, 3, 4]] //= unit
    return unit, table
