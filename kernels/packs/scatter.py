"""Copies a packed adapter into a slot of every layer, in groups of a few megabytes.

An adapter lies in host memory as the A and B of all its slices, at their true ranks. A `SlotTable`
knows where the slices' slots lie and turns the addresses into groups of pieces, each some rows to
copy. Group by group, so that a whole adapter never holds the memory bus, or a GPU's copy engine,
in one go. How they are copied depends on the device:

- CPU: one call into C for a group, without the GIL; PyTorch's own copies where C cannot be
  had
- GPU: into staging memory (see `device_staging`), and one Triton kernel that spreads the group

Nothing is cleared: kernels read no further than the true ranks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.backends import resolve_backend
from multilora_kernels.native import check_size, load_releasing_library
from multilora_kernels.packs.device_staging import DeviceStaging
from multilora_kernels.packs.pieces import PIECE, host_bytes, in_groups

GROUP_BYTES = 4 << 20
STAGING_BYTES = 16 << 20


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = load_releasing_library()
    check_size(library, "multilora_scatter_piece_bytes", PIECE.itemsize)
    return library


@dataclass(frozen=True)
class SlotIndex:
    """Where an adapter's matrices lie in host memory; the caller vouches for the addresses.

    Attributes:
        rows: int32 [n], the slices that the adapter has.
        a_ranks: int32 [n], rows of A.
        ranks: int32 [n], columns of B.
        a_addresses: int64 [n], where A begins: [a_rank, K], contiguous, of the slots' dtype.
        b_addresses: int64 [n], where B begins: [N, rank], or [rank, N] if the slots hold B's
            columns contiguously; likewise.
    """

    rows: npt.NDArray[np.int32]
    a_ranks: npt.NDArray[np.int32]
    ranks: npt.NDArray[np.int32]
    a_addresses: npt.NDArray[np.int64]
    b_addresses: npt.NDArray[np.int64]


@dataclass(frozen=True)
class PieceGroup:
    """Pieces to be copied in one go.

    Attributes:
        pieces: [n] of `PIECE`.
        matrix: int64 [n], which matrix each is of: 2 * row for A, 2 * row + 1 for B.
        line: int64 [n], its first row (or column, where those are contiguous) in the matrix.
        slot: The slot.
    """

    pieces: npt.NDArray[np.void]
    matrix: npt.NDArray[np.int64]
    line: npt.NDArray[np.int64]
    slot: int

    @property
    def nbytes(self) -> int:
        """Bytes to copy."""
        return int((self.pieces["rows"] * self.pieces["row_bytes"]).sum())


@dataclass(frozen=True)
class _Places:
    """Where one matrix of every slice lies, in lines: rows of A; rows or columns of B.

    Attributes:
        base: int64 [slices], addresses of the first slots.
        slot_stride: int64 [slices], bytes from slot to slot.
        line_stride: int64 [slices], bytes from line to line.
        lines: int64 [slices], how many a slot has.
        length: int64 [slices], elements of a line.
    """

    base: npt.NDArray[np.int64]
    slot_stride: npt.NDArray[np.int64]
    line_stride: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]

    @classmethod
    def of(cls, matrices: Sequence[torch.Tensor]) -> _Places:
        """The places of [slots, lines, length] tensors whose lines are contiguous."""
        width = matrices[0].element_size()
        columns = (
            [m.data_ptr() for m in matrices],
            [m.stride(0) * width for m in matrices],
            [m.stride(1) * width for m in matrices],
            [m.size(1) for m in matrices],
            [m.size(2) for m in matrices],
        )
        return cls(*(np.array(column, np.int64) for column in columns))


class SlotTable:
    """Where A and B of every slice lie in every slot; built once per model.

    Keeps the tensors, and their addresses: they must not be moved (`Tensor.set_`, `resize_`).

    Attributes:
        slots, dtype, device: Of the tensors.
        staging_bytes: Of device memory that copies to a GPU go through.
    """

    def __init__(
        self,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        *,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        """Notes the addresses; on a GPU, allocates all the device memory that copies need.

        Args:
            lora_a: A tensor [slots, R_a, K] or [slots, 1, R_a, K] per slice row; rows contiguous.
            lora_b: [slots, N, R] or [slots, 1, N, R] likewise; rows or columns contiguous (see
                `column_major`).
            staging_bytes: Of device memory that copies to a GPU go through.

        Raises:
            ValueError: They differ in number, slots, dtype or device, or have other strides.
        """
        if not lora_a or len(lora_a) != len(lora_b):
            raise ValueError(
                f"as many lora_a as lora_b are needed, at least one: found {len(lora_a)} and "
                f"{len(lora_b)}"
            )
        self._a = [_matrices(a, f"lora_a[{i}]") for i, a in enumerate(lora_a)]
        self._b = [_matrices(b, f"lora_b[{i}]") for i, b in enumerate(lora_b)]
        first = self._a[0]
        for i, tensor in enumerate((*self._a, *self._b)):
            name = f"lora_{'a' if i < len(self._a) else 'b'}[{i % len(self._a)}]"
            found = (tensor.size(0), tensor.dtype, tensor.device)
            expected = (first.size(0), first.dtype, first.device)
            if found != expected:
                raise ValueError(
                    f"{name} has (slots, dtype, device) {found}, lora_a[0] has {expected}"
                )
        for i, a in enumerate(self._a):
            if a.stride(2) != 1:
                raise ValueError(f"lora_a[{i}] needs contiguous rows, has strides {a.stride()}")
        self._by_column = np.array([b.stride(2) != 1 for b in self._b])
        for i, b in enumerate(self._b):
            if b.stride(2) != 1 and b.stride(1) != 1:
                raise ValueError(
                    f"lora_b[{i}] needs contiguous rows or columns, has strides {b.stride()}"
                )
        self._a_places = _Places.of(self._a)
        self._b_places = _Places.of(
            [b.mT if t else b for b, t in zip(self._b, self._by_column, strict=True)]
        )
        self._outputs = np.array([b.size(1) for b in self._b], np.int64)
        self._max_ranks = np.array([b.size(2) for b in self._b], np.int64)
        self.slots = first.size(0)
        self.dtype = first.dtype
        self.device = first.device
        self._staging: DeviceStaging | None = None
        if self.device.type == "cuda":
            self._staging = DeviceStaging(self.device, staging_bytes)
        self.staging_bytes = staging_bytes

    def scatter(self, slot: int, index: SlotIndex, *, backend: str = "auto") -> None:
        """Copies an adapter into a slot; what lies past its ranks stays as it was.

        *Semantics*, for each i < n with slice s = rows[i]::

            lora_a[s][slot, :a_ranks[i]] = [a_ranks[i], K_s] at a_addresses[i]
            lora_b[s][slot, :, :ranks[i]] = [N_s, ranks[i]] at b_addresses[i], or
                [ranks[i], N_s] transposed if the columns of lora_b[s] are contiguous

        Args:
            slot: Which slot.
            index: What to copy.
            backend: As for `copy`.

        Raises:
            ValueError: Something would be written outside its bounds, or is of a wrong kind.
            NativeUnavailableError: As for `copy`.
            TritonUnavailableError: As for `copy`.
        """
        for group in self.pieces(slot, index):
            self.copy(group, backend=backend)

    def pieces(
        self, slot: int, index: SlotIndex, *, most_bytes: int = GROUP_BYTES
    ) -> list[PieceGroup]:
        """What `copy` is to be called with, group after group, to copy an adapter into a slot.

        Args:
            slot: Which slot.
            index: What to copy.
            most_bytes: That a group has, but for a single row that is longer.

        Raises:
            ValueError: Something would be written outside its bounds, or is of a wrong kind.
        """
        if not 0 <= slot < self.slots:
            raise ValueError(f"there is no slot {slot}: found {self.slots} slots")
        if most_bytes < 1:
            raise ValueError(f"a group needs at least one byte, found {most_bytes}")
        self._check_index(index)
        pieces, matrix = self._whole_pieces(slot, index)
        return [
            PieceGroup(group, matrix[of], line, slot)
            for group, of, line in in_groups(pieces, most_bytes)
        ]

    def copy(self, group: PieceGroup, *, backend: str = "auto") -> None:
        """Copies a group of pieces.

        On a GPU the work is queued on the current stream; the host memory must stay as it is until
        that has run.

        Args:
            group: One of `pieces`.
            backend: `native`, `torch`, `triton`, or `auto` for the best on the slots' device.

        Raises:
            ValueError: The group does not fit the staging memory.
            NativeUnavailableError: `native` was asked for by name and cannot be had.
            TritonUnavailableError: Likewise for `triton`.
        """
        backend = resolve_backend(backend, self.device)
        if backend == "native":
            _library().multilora_scatter(
                ctypes.c_void_p(group.pieces.ctypes.data), ctypes.c_int64(len(group.pieces))
            )
        elif backend == "torch":
            self._copy_torch(group)
        else:
            self._device_staging().copy(group.pieces)

    def warm_up(self) -> None:
        """Compiles what copies to a GPU need, so that no step waits for it; else does nothing."""
        if resolve_backend("auto", self.device) == "triton":
            self._device_staging().warm_up()

    def _device_staging(self) -> DeviceStaging:
        if self._staging is None:  # Triton's interpreter, on a CPU
            self._staging = DeviceStaging(self.device, self.staging_bytes)
        return self._staging

    def _check_index(self, index: SlotIndex) -> None:
        columns = (index.rows, index.a_ranks, index.ranks, index.a_addresses, index.b_addresses)
        shapes = {column.shape for column in columns}
        if len(shapes) > 1 or index.rows.ndim != 1:
            raise ValueError(f"the index must be five vectors of one length, found shapes {shapes}")
        rows = index.rows
        if ((rows < 0) | (rows >= len(self._a))).any():
            raise ValueError(f"rows must lie in [0, {len(self._a)}), found {rows.tolist()}")
        for name, found, most in (
            ("a_ranks", index.a_ranks, self._a_places.lines[rows]),
            ("ranks", index.ranks, self._max_ranks[rows]),
        ):
            if ((found < 0) | (found > most)).any():
                raise ValueError(
                    f"{name} {found.tolist()} do not fit the slots, which hold {most.tolist()}"
                )

    def _whole_pieces(
        self, slot: int, index: SlotIndex
    ) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
        """[2n] of `PIECE`, A and B of each slice; and the matrices that they are."""
        width = self.dtype.itemsize
        rows = index.rows.astype(np.int64)
        by_column, outputs = self._by_column[rows], self._outputs[rows]
        pieces = np.empty((len(rows), 2), PIECE)
        for part, places, addresses, lines, length in (
            (0, self._a_places, index.a_addresses, index.a_ranks, self._a_places.length[rows]),
            (
                1,
                self._b_places,
                index.b_addresses,
                np.where(by_column, index.ranks, outputs),
                np.where(by_column, outputs, index.ranks),
            ),
        ):
            piece = pieces[:, part]
            piece["source"] = addresses
            piece["target"] = places.base[rows] + slot * places.slot_stride[rows]
            piece["rows"] = lines
            piece["row_bytes"] = length * width
            piece["stride"] = places.line_stride[rows]
        return pieces.reshape(-1), (2 * rows[:, None] + (0, 1)).reshape(-1)

    def _copy_torch(self, group: PieceGroup) -> None:
        width = self.dtype.itemsize
        for piece, matrix, line in zip(
            group.pieces, group.matrix.tolist(), group.line.tolist(), strict=True
        ):
            row, rows, columns = matrix // 2, int(piece["rows"]), int(piece["row_bytes"]) // width
            whole = self._b[row] if matrix % 2 else self._a[row]
            if matrix % 2 and self._by_column[row]:
                whole = whole.mT
            source = host_bytes(int(piece["source"]), rows * columns * width)
            part = whole[group.slot, line : line + rows, :columns]
            part.copy_(source.view(self.dtype).view(rows, columns), non_blocking=True)


def _matrices(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor as [slots, rows, columns], over the same memory."""
    if tensor.dim() == 4 and tensor.size(1) == 1:
        return tensor.select(1, 0)
    if tensor.dim() != 3:
        raise ValueError(
            f"{name} must be [slots, rows, columns], or with a 1 after the slots; found "
            f"{list(tensor.shape)}"
        )
    return tensor
