"""An adapter as one contiguous host buffer: this worker's slices, at true rank, scaled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels import SlotTable, host_memory
from multilora_kernels.blocks import BLOCK, DTYPES, BlockReadError, read_blocks
from vllm_multilora.adapters.checkpoint import AdapterCheckpoint
from vllm_multilora.adapters.errors import AdapterReadError
from vllm_multilora.adapters.header import TensorInfo
from vllm_multilora.adapters.layout import ModelLayout, SliceLayout, block_bytes
from vllm_multilora.adapters.matching import MatchedModule, match


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter that is ready for any slot; read-only.

    Attributes:
        buffer: [elements] of the slots' dtype, contiguous; pinned if that was asked for.
        rows: int32 [n], the rank tables' rows of the slices that the adapter has, ascending.
        ranks: int32 [n], their true ranks: the columns of B.
        a_ranks: int32 [n], the rows of A held here: the same unless the rank is sharded.
        a_offsets: int64 [n], where A [a_rank, inputs] begins in the buffer, in elements.
        b_offsets: int64 [n], where B begins: [outputs, rank], or [rank, outputs] if the layout
            has columns first.
    """

    buffer: torch.Tensor
    rows: npt.NDArray[np.int32]
    ranks: npt.NDArray[np.int32]
    a_ranks: npt.NDArray[np.int32]
    a_offsets: npt.NDArray[np.int64]
    b_offsets: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.nbytes

    def scatter_into(self, slots: SlotTable, slot: int, *, threads: int | None = None) -> None:
        """Copies the adapter into a slot of every layer; see `SlotTable.scatter`."""
        slots.scatter(
            self.buffer,
            slot,
            self.rows,
            self.a_ranks,
            self.ranks,
            self.a_offsets,
            self.b_offsets,
            threads=threads,
        )


def pack(
    checkpoint: AdapterCheckpoint,
    layout: ModelLayout,
    *,
    pin: bool = False,
    threads: int = 1,
    backend: str = "auto",
) -> PackedAdapter:
    """Reads an adapter's tensors, this worker's part of them, into one buffer.

    The scaling of each module (alpha / r, rank-stabilised, by pattern) is multiplied into B, in
    float32 and with one rounding to the slots' dtype. Nearly all of the time is one call that
    does not hold the GIL.

    Args:
        checkpoint: An open checkpoint.
        layout: What the base model accepts.
        pin: Whether the buffer is page-locked, for copies to a GPU.
        threads: How many threads read.
        backend: As for `multilora_kernels.blocks.read_blocks`.

    Raises:
        AdapterFormatError: The adapter does not fit the base model, or needs something that is
            not computed here; see `matching.match`.
        AdapterReadError: The file was truncated or written to after it was opened, or cannot be
            read.
    """
    parts = [
        (part, module)
        for module in match(checkpoint, layout)
        for part in layout.by_name[module.name]
    ]
    parts.sort(key=lambda item: item[0].row)
    ranks = [module.rank for _, module in parts]
    a_ranks = [last - first for first, last in (p.rows_of_a(m.rank) for p, m in parts)]
    shapes = [layout.block_shapes(part, rank) for (part, _), rank in zip(parts, ranks, strict=True)]
    elements = [
        block_bytes(rows * columns, layout.dtype) // layout.dtype.itemsize
        for pair in shapes
        for rows, columns in pair
    ]
    offsets = np.zeros(len(elements) + 1, np.int64)
    np.cumsum(elements, out=offsets[1:])
    table = np.array(
        [
            block
            for index, (part, module) in enumerate(parts)
            for block in _blocks(part, module, layout, offsets[2 * index : 2 * index + 2])
        ],
        dtype=BLOCK,
    )
    order = np.argsort(table["file_offset"], kind="stable")
    size = int(offsets[-1])
    if pin:
        buffer = torch.empty(size, dtype=layout.dtype, pin_memory=True)
    else:
        buffer = host_memory.empty(size, layout.dtype)
    try:
        read_blocks(checkpoint.fileno(), table[order], buffer, threads=threads, backend=backend)
    except BlockReadError as error:
        index = int(order[error.block])
        module = parts[index // 2][1]
        name = module.b_name if index % 2 else module.a_name
        if error.ends_early:
            raise checkpoint.ends_early(name) from None
        raise AdapterReadError(f"{checkpoint.tensors_path}: {name}: {error}") from error
    checkpoint.require_unchanged()
    return PackedAdapter(
        buffer,
        rows=np.array([part.row for part, _ in parts], np.int32),
        ranks=np.array(ranks, np.int32),
        a_ranks=np.array(a_ranks, np.int32),
        a_offsets=offsets[0:-1:2].copy(),
        b_offsets=offsets[1::2].copy(),
    )


def _blocks(
    part: SliceLayout, module: MatchedModule, layout: ModelLayout, targets: Iterable[int]
) -> Iterable[tuple[float, ...]]:
    """The entries of A and B in the table of what is to be read."""
    a_target, b_target = targets
    yield _block(module.a, part.rows_of_a(module.rank), part.input_range, a_target)
    yield _block(
        module.b,
        part.output_range,
        (0, module.rank),
        b_target,
        transposed=layout.columns_first,
        scale=module.scaling,
    )


def _block(
    info: TensorInfo,
    rows: tuple[int, int],
    columns: tuple[int, int],
    target: int,
    *,
    transposed: bool = False,
    scale: float = 1.0,
) -> tuple[float, ...]:
    width = info.shape[1]
    first = rows[0] * width + columns[0]
    return (
        info.begin + first * info.dtype.itemsize,
        width,
        DTYPES.index(info.dtype),
        rows[1] - rows[0],
        columns[1] - columns[0],
        target,
        transposed,
        scale,
    )
