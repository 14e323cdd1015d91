"""Reads a tensor file once from start to end, and hashes, packs and checks its bytes.

The bytes are read in spans that stay in the cache while they are checked, hashed and packed. A span
holds whole rows of one or more consecutive tensors. Hashing runs on a thread of its own, while the
same span is packed and the next one is read: each takes about as long as the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from multilora_kernels.dtypes import KERNEL_DTYPES, DType
from multilora_kernels.packs.packing import CONVERT, PIECE, RAW, TRANSPOSE, PieceTable
from vllm_multilora.adapters.adapter_errors import AdapterReadError
from vllm_multilora.adapters.files.header import TensorInfo
from vllm_multilora.adapters.files.tensor_file import TensorFile

SPAN_BYTES = 2 << 20
_Ints = npt.NDArray[np.int64]


class TensorPart(NamedTuple):
    """A part of a tensor that is to be packed, or only judged.

    Attributes:
        dtype: Of the slots.
        scale: The factor of its values on the way into a slot.
        rows: First row that is wanted, and one past the last; a vector is a column. None: the
            tensor as it is, whatever its shape.
        columns: Likewise.
        kind: `CONVERT`, `TRANSPOSE` or `RAW`, as `multilora_kernels.packs.packing` has them.
        stride: Elements from row to row where the part goes, if that is not transposed; None: as
            many as it has columns.
    """

    tensor: str
    dtype: DType
    scale: float = 1.0
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] = (0, 1)
    kind: int = CONVERT
    stride: int | None = None


def read_once(
    file: TensorFile,
    parts: Sequence[TensorPart],
    *,
    addresses: _Ints | None = None,
    show: Callable[[memoryview], object] | None = None,
) -> set[int]:
    """Reads a file's tensors once, in the order of their bytes, and packs parts of them.

    Args:
        file: An open file.
        parts: What to do with its tensors, all of types in `KERNEL_DTYPES`.
        addresses: [parts], where their first elements go; 0: the part is only judged. None: all
            are.
        show: Called with every span of the data, in order, on one other thread where there are
            several; the memory is used again afterwards. None: spans of which no part is wanted are
            not read.

    Returns:
        The indexes of the parts that slots cannot hold: a value is NaN or infinite, or becomes so
        when it is scaled and rounded.

    Raises:
        AdapterReadError: The file was truncated after it was opened, or cannot be read; or the
            system gives no thread.
    """
    matrices = {part.tensor for part in parts if part.rows is not None}
    bounds = np.fromiter(_bounds(file, matrices), np.int64)
    table, part_of = _cut(parts, file.tensors, addresses, bounds)
    buffers = np.empty((2, int(np.diff(bounds).max(initial=0))), np.uint8)
    shown: list[Future[object] | None] = [None, None]
    is_alone = len(bounds) <= 2  # one span: a thread would cost more than it saves
    bad: set[int] = set()
    with ThreadPoolExecutor(1) as beside:  # the thread starts with the first span that is shown
        for index, (begin, end) in enumerate(pairwise(bounds.tolist())):
            first, last = table.pieces_of(index)
            if show is None and first == last:
                continue
            if (before := shown[index % 2]) is not None:
                before.result()
            span = buffers[index % 2, : end - begin]
            count = file.file.read_into(span.data, begin)
            if count < len(span):
                raise file.ends_early(begin + count)
            if show is not None and is_alone:
                show(span.data)
            elif show is not None:
                shown[index % 2] = _begin(beside, show, span.data)
            if first < last:
                overflowing = table.pack(index, span)
                if overflowing.any():
                    bad.update(part_of[first:last][overflowing].tolist())
        for last_shown in shown:
            if last_shown is not None:
                last_shown.result()
    return bad


def _begin(
    beside: ThreadPoolExecutor, show: Callable[[memoryview], object], span: memoryview
) -> Future[object]:
    try:
        return beside.submit(show, span)
    except RuntimeError as error:  # as Python says it, whatever the system's error was
        raise AdapterReadError(f"the system gives no thread to hash its files: {error}") from error


def _bounds(file: TensorFile, matrices: set[str]) -> Iterator[int]:
    """Where spans begin, and where the last one ends."""
    begin = at = file.begin
    yield begin
    for name, info in file.tensors.items():
        row = info.dtype.itemsize * (_row_length(info) if name in matrices else 1)
        while at < info.end:
            fit = max(begin + SPAN_BYTES - at, 0) // row * row
            if not fit and at == begin:
                fit = row  # larger than a span: one of its own
            at = min(at + fit, info.end)
            if at < info.end:
                yield at
                begin = at
    if at > begin:
        yield at


def _cut(
    parts: Sequence[TensorPart],
    tensors: Mapping[str, TensorInfo],
    addresses: _Ints | None,
    bounds: _Ints,
) -> tuple[PieceTable, _Ints]:
    """Cuts parts where spans end; returns the pieces, and the part that each is of."""
    rows = [_numbers(part, tensors[part.tensor]) for part in parts]
    numbers = np.array(rows, np.int64).reshape(len(rows), len(_FIELDS)).T
    whole = dict(zip(_FIELDS, numbers, strict=True))
    if addresses is not None:
        whole["target"] = addresses
    begin = whole["matrix"] + whole["first"] * whole["row_bytes"]
    end = whole["matrix"] + whole["last"] * whole["row_bytes"]
    # The spans that each part reaches into.
    low = np.searchsorted(bounds, begin, side="right") - 1
    high = np.searchsorted(bounds, end, side="left")
    counts = np.where(end > begin, high - low, 0)
    part_of = np.repeat(np.arange(len(counts)), counts)
    ordinal = np.arange(len(part_of)) - np.repeat(np.cumsum(counts) - counts, counts)
    span_of = low[part_of] + ordinal
    order = np.argsort(span_of, kind="stable")
    part_of, span_of = part_of[order], span_of[order]
    of = {name: column[part_of] for name, column in whole.items()}
    # Rows, counted from the matrix's first, that lie in the span.
    row = np.maximum(of["first"], (bounds[span_of] - of["matrix"]) // of["row_bytes"])
    last = np.minimum(of["last"], (bounds[span_of + 1] - of["matrix"]) // of["row_bytes"])
    pieces = np.zeros(len(part_of), PIECE)
    pieces["source"] = of["matrix"] + row * of["row_bytes"] + of["offset"] - bounds[span_of]
    pieces["rows"] = last - row
    pieces["target"] = np.where(of["target"], of["target"] + (row - of["first"]) * of["step"], 0)
    for name in (
        "source_stride",
        "source_dtype",
        "columns",
        "target_stride",
        "target_dtype",
        "kind",
    ):
        pieces[name] = of[name]
    pieces["scale"] = np.array([part.scale for part in parts], np.float64)[part_of]
    firsts = np.searchsorted(span_of, np.arange(len(bounds)))
    return PieceTable(pieces, firsts, np.diff(bounds)), part_of


_FIELDS = (
    "matrix",  # first byte of the tensor
    "row_bytes",
    "first",  # row, and one past the last
    "last",
    "offset",  # of the first wanted column, in bytes
    "source_stride",
    "source_dtype",
    "columns",
    "target",
    "step",  # bytes in the target from row to row
    "target_stride",
    "target_dtype",
    "kind",
)


def _row_length(info: TensorInfo) -> int:
    return info.shape[1] if len(info.shape) > 1 else 1


def _numbers(part: TensorPart, info: TensorInfo) -> Iterable[int]:
    width = info.dtype.itemsize
    if part.rows is None:
        rows, columns, stride = (0, (info.end - info.begin) // width), (0, 1), 1
    else:
        rows, columns, stride = part.rows, part.columns, _row_length(info)
    across, down = columns[1] - columns[0], rows[1] - rows[0]
    stored = (info.dtype if part.kind == RAW else part.dtype).itemsize
    transposed = part.kind == TRANSPOSE
    wide = across if part.stride is None else part.stride
    return (
        info.begin,
        stride * width,
        *rows,
        columns[0] * width,
        stride,
        KERNEL_DTYPES.index(info.dtype),
        across,
        0,
        stored if transposed else wide * stored,
        down if transposed else wide,
        KERNEL_DTYPES.index(part.dtype),
        part.kind,
    )
