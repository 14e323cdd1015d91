"""Pieces of an adapter to copy into a slot: rows in host memory, and where they go."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

PIECE = np.dtype([(name, np.int64) for name in ("source", "target", "rows", "row_bytes", "stride")])
"""Rows to copy; `struct scatter_piece` in kernels/native/sources/abi.h. All but `rows` in bytes.

- `source`: the address of the first, after which the others follow
- `target`: the address of the first in the slot
- `rows`, `row_bytes`: how many, how long
- `stride`: from row to row in the slot
"""

MAX_PIECES = 2048
"""In a group."""

REGISTERED_BYTES = 16 << 20
"""Host memory is registered with CUDA in parts that end at multiples of this: registering keeps the
driver from launching kernels meanwhile, a few milliseconds for such a part."""

_Ints = npt.NDArray[np.int64]


def in_groups(
    pieces: npt.NDArray[np.void], most_bytes: int
) -> Iterator[tuple[npt.NDArray[np.void], _Ints, _Ints]]:
    """Cuts pieces between rows and puts them together in groups.

    Args:
        pieces: [n] of `PIECE`.
        most_bytes: Of a group; a single row may be longer.

    Yields:
        Some [k] of `PIECE`, of which whole piece each is a part, and its first row there.
    """
    at_a_time = np.maximum(most_bytes // np.maximum(pieces["row_bytes"], 1), 1)
    counts = np.where(pieces["row_bytes"] > 0, -(-pieces["rows"] // at_a_time), 0)
    of = np.repeat(np.arange(len(pieces)), counts)
    line = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * at_a_time[of]
    cut = pieces[of]
    cut["rows"] = np.minimum(at_a_time[of], cut["rows"] - line)
    cut["source"] += line * cut["row_bytes"]
    cut["target"] += line * cut["stride"]
    first = held = 0
    sizes = (cut["rows"] * cut["row_bytes"]).tolist()
    for i, size in enumerate(sizes):
        if i > first and (held + size > most_bytes or i - first == MAX_PIECES):
            yield cut[first:i], of[first:i], line[first:i]
            first, held = i, 0
        held += size
    if first < len(sizes):
        yield cut[first:], of[first:], line[first:]


def registered_parts(address: int, size: int) -> Iterator[tuple[int, int]]:
    """Cuts a range of memory where parts of it end that were registered with CUDA.

    Yields:
        The address and the bytes of each part.
    """
    end = address + size
    while address < end:
        until = min(end, (address // REGISTERED_BYTES + 1) * REGISTERED_BYTES)
        yield address, until - address
        address = until


def host_bytes(address: int, size: int) -> torch.Tensor:
    """uint8 [size], the bytes at an address; the caller keeps the memory alive."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
