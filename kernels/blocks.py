"""Reads matrices from a file into one buffer: parts of them, converted, scaled, transposed.

One native call reads all of them without the GIL; where no compiler is at hand, PyTorch does the
same, block by block.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels import native
from multilora_kernels.native.compiler import load_releasing_library

BLOCK = np.dtype(
    [
        ("file_offset", np.int64),
        ("file_columns", np.int64),
        ("dtype", np.int64),
        ("rows", np.int64),
        ("columns", np.int64),
        ("target", np.int64),
        ("transposed", np.int64),
        ("scale", np.float64),
    ]
)
"""A matrix to read; `struct block` in native/blocks.c.

- `file_offset`: where its first wanted element lies in the file, in bytes
- `file_columns`: columns of the matrix in the file, of which `columns` follow each other
- `dtype`: of the matrix in the file, an index into `DTYPES`
- `rows`, `columns`: what is wanted
- `target`: where it goes in the buffer, in elements
- `transposed`: 1 to store it [columns, rows], 0 for [rows, columns]
- `scale`: a factor, as float32
"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SCRATCH_BYTES = 256 * 1024  # stays in a core's own cache
_ENDS_EARLY = -1
_SHORT = "the file ends early"


class BlockReadError(OSError):
    """A block could not be read.

    Attributes:
        block: Its index in the table.
        ends_early: Whether the file ends before the block does.
    """

    def __init__(self, block: int, reason: str, *, ends_early: bool = False) -> None:
        super().__init__(reason)
        self.block = block
        self.ends_early = ends_early


def read_blocks(
    descriptor: int,
    blocks: npt.NDArray[np.void],
    buffer: torch.Tensor,
    *,
    threads: int = 1,
    backend: str = "auto",
) -> None:
    """Reads blocks of a file into a buffer, each wanted byte once.

    Values are widened to float32, multiplied, and rounded once to the buffer's type.

    Args:
        descriptor: An open file, read with `pread`.
        blocks: [n] of `BLOCK`, in any order; those sorted by `file_offset` read the file in order.
        buffer: [elements], float32, bfloat16 or float16, contiguous, on the CPU.
        threads: How many threads read.
        backend: `native`, `torch`, or `auto`: `native` where it can be built.

    Raises:
        BlockReadError: The file ends early or cannot be read.
        ValueError: A block does not lie in the buffer, or an argument is of a wrong kind.
        NativeUnavailableError: `native` was asked for by name and cannot be had.
    """
    _check(blocks, buffer)
    if threads < 1:
        raise ValueError(f"at least one thread is needed, found {threads}")
    if backend == "auto":
        backend = "native" if native.is_available() else "torch"
    if backend == "native":
        _read_native(descriptor, blocks, buffer, threads)
    elif backend == "torch":
        _read_torch(descriptor, blocks, buffer)
    else:
        raise ValueError(f"unknown backend {backend!r}; choose one of auto, native, torch")


def _check(blocks: npt.NDArray[np.void], buffer: torch.Tensor) -> None:
    if blocks.dtype != BLOCK or blocks.ndim != 1 or not blocks.flags.c_contiguous:
        raise ValueError(f"blocks must be a contiguous [n] of BLOCK, found {blocks.dtype}")
    if buffer.dtype not in DTYPES or buffer.device.type != "cpu" or buffer.dim() != 1:
        raise ValueError(
            f"the buffer must be a vector of {', '.join(map(str, DTYPES))} on the CPU, found "
            f"{buffer.dtype} {list(buffer.shape)} on {buffer.device}"
        )
    if not buffer.is_contiguous():
        raise ValueError("the buffer must be contiguous")
    sizes = blocks["rows"].astype(np.float64) * blocks["columns"]  # cannot overflow
    wrong = (
        (blocks["rows"] < 0)
        | (blocks["columns"] < 0)
        | (blocks["columns"] > blocks["file_columns"])
        | (blocks["file_offset"] < 0)
        | (blocks["target"] < 0)
        | (blocks["target"] > buffer.numel() - sizes)
        | (blocks["dtype"] < 0)
        | (blocks["dtype"] >= len(DTYPES))
    )
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"block {first} is {dict(zip(BLOCK.names or (), blocks[first].item(), strict=True))}, "
            f"which does not fit a buffer of {buffer.numel()} elements"
        )


def _read_native(
    descriptor: int, blocks: npt.NDArray[np.void], buffer: torch.Tensor, threads: int
) -> None:
    longest = int(blocks["columns"].max(initial=1)) * torch.float32.itemsize
    scratch_bytes = max(_SCRATCH_BYTES, longest)
    scratch = np.empty(threads * scratch_bytes, np.uint8)
    failed = ctypes.c_int64(-1)
    function = load_releasing_library().multilora_read_blocks
    function.restype = ctypes.c_int64
    result = function(
        *map(ctypes.c_int64, (descriptor, blocks.ctypes.data, len(blocks), buffer.data_ptr())),
        ctypes.c_int64(DTYPES.index(buffer.dtype)),
        *map(ctypes.c_int64, (scratch.ctypes.data, scratch_bytes, threads)),
        ctypes.byref(failed),
    )
    if result == _ENDS_EARLY:
        raise BlockReadError(failed.value, _SHORT, ends_early=True)
    if result:
        raise BlockReadError(failed.value, os.strerror(result))


def _read_torch(descriptor: int, blocks: npt.NDArray[np.void], buffer: torch.Tensor) -> None:
    for index, block in enumerate(blocks):
        rows, columns, width = (int(block[k]) for k in ("rows", "columns", "file_columns"))
        if not rows * columns:
            continue
        dtype = DTYPES[int(block["dtype"])]
        # From the first wanted element to the last: whole rows, but for the ends.
        span = torch.empty((rows - 1) * width + columns, dtype=dtype)
        try:
            complete = read_span(descriptor, int(block["file_offset"]), span)
        except OSError as error:
            raise BlockReadError(index, str(error.strerror)) from error
        if not complete:
            raise BlockReadError(index, _SHORT, ends_early=True)
        matrix = span.as_strided((rows, columns), (width, 1))
        start = int(block["target"])
        target = buffer[start : start + rows * columns]
        scaled = matrix.to(torch.float32) * float(block["scale"])
        if block["transposed"]:
            target.view(columns, rows).copy_(scaled.T)
        else:
            target.view(rows, columns).copy_(scaled)


def read_span(descriptor: int, offset: int, target: torch.Tensor) -> bool:
    """Reads a tensor's bytes as they lie in a file.

    Args:
        descriptor: An open file, read with `pread`.
        offset: The first byte.
        target: A contiguous CPU tensor.

    Returns:
        Whether the file reaches as far.

    Raises:
        OSError: The file cannot be read.
    """
    left = target.view(-1).view(torch.uint8).numpy().data if target.numel() else b""
    while left:
        count = os.preadv(descriptor, [left], offset)
        if not count:
            return False
        left = left[count:]
        offset += count
    return True
