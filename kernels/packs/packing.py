"""Packs parts of a checkpoint: from a span of its bytes to where they belong, and judged.

One native call does all pieces of a span without the GIL; where it cannot be had, numpy
does the same, bit for bit. Nothing here needs PyTorch.
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from multilora_kernels.dtypes import BFLOAT16, FLOAT16, FLOAT32, KERNEL_DTYPES, DType
from multilora_kernels.native.builds import NativeUnavailableError
from multilora_kernels.native.compiler import check_size, load_packing_library

logger = logging.getLogger(__name__)

PIECE = np.dtype(
    [
        *(
            (name, np.int64)
            for name in (
                "source",
                "source_stride",
                "source_dtype",
                "rows",
                "columns",
                "target",
                "target_stride",
                "target_dtype",
                "kind",
            )
        ),
        ("scale", np.float64),
    ]
)
"""A part of a matrix to pack; `struct pack_piece` in kernels/native/sources/abi.h.

- `source`: where its first element lies in the span, in bytes
- `source_stride`: from row to row there, in elements
- `source_dtype`: an index into `KERNEL_DTYPES`
- `rows`, `columns`: its size
- `target`: the address of its first element; 0: it is only judged
- `target_stride`: from row to row as they are stored, in elements
- `target_dtype`: the slots' dtype, an index into `KERNEL_DTYPES`
- `kind`: `CONVERT`, `TRANSPOSE` or `RAW`
- `scale`: the factor of its values on the way into a slot, rounded to float32
"""

CONVERT, TRANSPOSE, RAW = range(3)
"""Store [rows, columns] converted; [columns, rows] converted; or [rows, columns] as they are."""

BACKENDS = ("auto", "native", "numpy")

_INFINITY = {FLOAT32: 0x7F800000, BFLOAT16: 0x7F80, FLOAT16: 0x7C00}
_INFINITIES = np.array([_INFINITY[dtype] for dtype in KERNEL_DTYPES], np.uint32)
_WORDS: dict[int, type[np.unsignedinteger]] = {4: np.uint32, 2: np.uint16}


def largest_number(dtype: DType) -> float:
    """The largest finite number of a dtype in `KERNEL_DTYPES`."""
    return float(to_float32(np.array([_INFINITY[dtype] - 1], _WORDS[dtype.itemsize]), dtype)[0])


class PieceTable:
    """Pieces of consecutive spans, checked.

    Args:
        pieces: [n] of `PIECE`, those of each span together. The caller vouches for their targets.
        firsts: [spans + 1], the first piece of each span; the last entry is n.
        span_bytes: [spans], how long the spans are.
        backend: `native`, `numpy`, or `auto`: `native` where it can be built.

    Raises:
        ValueError: A piece reaches outside its span, or an argument is of a wrong kind.
        NativeUnavailableError: `native` was asked for by name and cannot be had.
    """

    def __init__(
        self,
        pieces: npt.NDArray[np.void],
        firsts: npt.NDArray[np.int64],
        span_bytes: npt.NDArray[np.int64],
        *,
        backend: str = "auto",
    ) -> None:
        if pieces.dtype != PIECE or pieces.ndim != 1 or not pieces.flags.c_contiguous:
            raise ValueError(f"pieces must be a contiguous [n] of PIECE, found {pieces.dtype}")
        counts = np.diff(firsts)
        if len(counts) != len(span_bytes) or (counts < 0).any() or counts.sum() != len(pieces):
            raise ValueError(
                f"firsts must count up to {len(pieces)} over {len(span_bytes)} spans, found "
                f"{firsts.tolist()}"
            )
        _check(pieces, np.repeat(span_bytes, counts))
        self._pieces = pieces
        self._firsts = firsts.tolist()
        self._span_bytes = span_bytes.tolist()
        self._infinities = _INFINITIES[pieces["target_dtype"]]
        self._library = _library(backend)

    def pieces_of(self, index: int) -> tuple[int, int]:
        """The first piece of a span, and one past its last."""
        return self._firsts[index], self._firsts[index + 1]

    def pack(self, index: int, span: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Packs the pieces of a span and says which of them slots cannot hold.

        *Semantics*, for each piece::

            value[i, j] = round(float32(scale) * float32(source[i, j]), target_dtype)
            stored[i, j] = value[i, j]; of RAW pieces source[i, j]; of TRANSPOSE pieces at [j, i]

        Values are multiplied in float32 and rounded once, to nearest, ties to even. A NaN stays a
        NaN; which one is left open.

        Args:
            index: Which span.
            span: uint8 [span_bytes[index]], contiguous.

        Returns:
            bool [pieces of the span]: whether a value of the piece is NaN or infinite, as a slot
            would hold it.

        Raises:
            ValueError: The span is of another length, or not contiguous bytes.
        """
        expected = self._span_bytes[index]
        if span.dtype != np.uint8 or span.shape != (expected,) or not span.flags.c_contiguous:
            raise ValueError(
                f"span {index} must be {expected} contiguous bytes, found {span.dtype} "
                f"{list(span.shape)}"
            )
        first, last = self.pieces_of(index)
        pieces, largest = self._pieces[first:last], np.zeros(last - first, np.uint32)
        if self._library is not None:
            self._library.multilora_pack(
                ctypes.c_void_p(span.ctypes.data),
                ctypes.c_void_p(pieces.ctypes.data),
                ctypes.c_int64(len(pieces)),
                ctypes.c_void_p(largest.ctypes.data),
            )
        else:
            for i, piece in enumerate(pieces):
                largest[i] = _pack_piece(span, piece)
        unsound: npt.NDArray[np.bool_] = largest >= self._infinities[first:last]
        return unsound


def _library(backend: str) -> ctypes.CDLL | None:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "native":
        return _native()
    return _best_library() if backend == "auto" else None


def _native() -> ctypes.CDLL:
    library = load_packing_library()
    check_size(library, "multilora_pack_piece_bytes", PIECE.itemsize)
    return library


def prepare() -> None:
    """Builds and loads what packs, for processes whose children may not write or read files."""
    _best_library()


@lru_cache(maxsize=1)
def _best_library() -> ctypes.CDLL | None:
    try:
        return _native()
    except NativeUnavailableError as error:
        logger.warning("Adapters are packed by numpy, more slowly than by C: %s", error)
        return None


def _check(pieces: npt.NDArray[np.void], span_bytes: npt.NDArray[np.int64]) -> None:
    wrong = np.zeros(len(pieces), np.bool_)
    for name, most in (("source_dtype", 2), ("target_dtype", 2), ("kind", RAW)):
        wrong |= (pieces[name] < 0) | (pieces[name] > most)
    for name in ("source", "source_stride", "rows", "columns", "target", "target_stride"):
        wrong |= pieces[name] < 0
    # In floating point: nothing overflows, and all that fits a span is exact.
    of = {name: pieces[name].astype(np.float64) for name in PIECE.names or ()}
    some = (pieces["rows"] > 0) & (pieces["columns"] > 0)
    width = np.where(pieces["source_dtype"] == 0, 4, 2)
    end = of["source"] + ((of["rows"] - 1) * of["source_stride"] + of["columns"]) * width
    wrong |= some & ((end > span_bytes) | (of["columns"] > of["source_stride"]))
    stored = np.where(pieces["kind"] == TRANSPOSE, of["rows"], of["columns"])
    wrong |= some & (pieces["target"] != 0) & (stored > of["target_stride"])
    if wrong.any():
        first = int(wrong.argmax())
        found = dict(zip(PIECE.names or (), pieces[first].item(), strict=True))
        raise ValueError(
            f"piece {first} is {found}, which does not fit its span of {span_bytes[first]} bytes"
        )


def to_float32(words: npt.NDArray[Any], dtype: DType) -> npt.NDArray[np.float32]:
    """The values of elements that are given as unsigned integers of their width; exact."""
    if dtype == FLOAT32:
        return words.view(np.float32)
    if dtype == FLOAT16:
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rounded(values: npt.NDArray[np.float32], dtype: DType) -> npt.NDArray[Any]:
    """Values of a dtype as unsigned integers of its width."""
    if dtype == FLOAT32:
        return values.view(np.uint32)
    if dtype == FLOAT16:
        with np.errstate(over="ignore", under="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + even) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet, rounded).astype(np.uint16)


def _pack_piece(span: npt.NDArray[np.uint8], piece: np.void) -> int:
    """What `multilora_pack` does for one piece; returns the largest magnitude's bits."""
    rows, columns = int(piece["rows"]), int(piece["columns"])
    if not rows or not columns:
        return 0
    source = KERNEL_DTYPES[int(piece["source_dtype"])]
    target = KERNEL_DTYPES[int(piece["target_dtype"])]
    elements = (rows - 1) * int(piece["source_stride"]) + columns
    first = int(piece["source"])
    flat = span[first : first + elements * source.itemsize].copy().view(_WORDS[source.itemsize])
    matrix = np.lib.stride_tricks.as_strided(
        flat, (rows, columns), (int(piece["source_stride"]) * source.itemsize, source.itemsize)
    )
    matrix = np.ascontiguousarray(matrix)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = to_float32(matrix, source) * np.float32(piece["scale"])
    words = _rounded(values, target)
    if int(piece["target"]):
        stored = matrix if piece["kind"] == RAW else words
        _store(stored.T if piece["kind"] == TRANSPOSE else stored, piece)
    return int((words & words.dtype.type(np.iinfo(words.dtype).max >> 1)).max())


def _store(matrix: npt.NDArray[Any], piece: np.void) -> None:
    stride, width = int(piece["target_stride"]), matrix.itemsize
    size = ((len(matrix) - 1) * stride + matrix.shape[1]) * width
    memory = (ctypes.c_uint8 * size).from_address(int(piece["target"]))
    target = np.frombuffer(memory, matrix.dtype)
    np.lib.stride_tricks.as_strided(target, matrix.shape, (stride * width, width))[:] = matrix
