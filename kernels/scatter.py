"""Moves a packed adapter into a slot of every layer, by one call.

An adapter arrives as one buffer with the A and B of all its slices, at their true ranks. A
`SlotTable` knows where the slices' slots lie and turns the buffer's index into a list of
pieces, each some rows to copy; how they are copied depends on the device:

- CPU: one call into C, on PyTorch's threads and without the GIL; PyTorch's own copies where no
  compiler is at hand
- GPU: one copy of the buffer to the device, and one Triton kernel that spreads it

Nothing is cleared: kernels read no further than the true ranks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels import native, triton_availability
from multilora_kernels.native.compiler import load_releasing_library

PIECE = np.dtype([(name, np.int64) for name in ("source", "target", "rows", "row_bytes", "stride")])
"""Rows to copy; `struct piece` in native/scatter.c. All but `rows` in bytes.

- `source`: where they begin in the buffer, in which they follow each other
- `target`: the address of the first in the slot
- `rows`, `row_bytes`: how many, how long
- `stride`: from row to row in the slot
"""

_Ints = npt.NDArray[np.integer]
BACKENDS = ("auto", "native", "torch", "triton")


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
    """

    def __init__(self, lora_a: Sequence[torch.Tensor], lora_b: Sequence[torch.Tensor]) -> None:
        """Notes the addresses.

        Args:
            lora_a: A tensor [slots, R_a, K] or [slots, 1, R_a, K] per slice row; rows contiguous.
            lora_b: [slots, N, R] or [slots, 1, N, R] likewise; rows or columns contiguous (see
                `column_major`).

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

    def scatter(
        self,
        buffer: torch.Tensor,
        slot: int,
        rows: _Ints,
        a_ranks: _Ints,
        ranks: _Ints,
        a_offsets: _Ints,
        b_offsets: _Ints,
        *,
        threads: int | None = None,
        backend: str = "auto",
    ) -> None:
        """Copies an adapter into a slot; what lies past its ranks stays as it was.

        *Semantics*, for each i < n with slice s = rows[i]::

            lora_a[s][slot, :a_ranks[i]] = buffer[a_offsets[i]:] as [a_ranks[i], K_s]
            lora_b[s][slot, :, :ranks[i]] = buffer[b_offsets[i]:] as [N_s, ranks[i]], or as
                [ranks[i], N_s] transposed if the columns of lora_b[s] are contiguous

        On a GPU the work is queued on the current stream; a pinned buffer must stay as it is
        until that has run.

        Args:
            buffer: [elements] of the slots' dtype on the CPU, contiguous.
            slot: Which slot.
            rows: [n], the slices that the adapter has.
            a_ranks: [n], rows of A.
            ranks: [n], columns of B.
            a_offsets: [n], where A begins in the buffer, in elements.
            b_offsets: [n], where B begins.
            threads: That copy, with `native`; PyTorch's number by default.
            backend: `native`, `torch`, `triton`, or `auto` for the best on the slots' device.

        Raises:
            ValueError: Something would be read or written outside its bounds, or is of a wrong
                kind.
            NativeUnavailableError: `native` was asked for by name and cannot be had.
            TritonUnavailableError: Likewise for `triton`.
        """
        if not 0 <= slot < self.slots:
            raise ValueError(f"there is no slot {slot}: found {self.slots} slots")
        self._check_buffer(buffer)
        columns = {
            "rows": rows,
            "a_ranks": a_ranks,
            "ranks": ranks,
            "a_offsets": a_offsets,
            "b_offsets": b_offsets,
        }
        index = {name: np.asarray(column, np.int64) for name, column in columns.items()}
        self._check_index(buffer, **index)
        backend = self._resolve(backend)
        if backend == "torch":
            self._scatter_torch(buffer, slot, **index)
            return
        pieces = self._pieces(slot, **index)
        if backend == "native":
            load_releasing_library().multilora_scatter(
                *map(ctypes.c_int64, (pieces.ctypes.data, len(pieces), buffer.data_ptr())),
                ctypes.c_int64(threads or torch.get_num_threads()),
            )
        elif len(pieces):
            from multilora_kernels.triton.scatter import scatter_launch

            staged = buffer.to(self.device, non_blocking=True)
            scatter_launch(staged, pieces).run()

    def _resolve(self, backend: str) -> str:
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
        on_cpu = self.device.type == "cpu"
        if backend == "auto":
            if self.device.type == "cuda" and triton_availability.is_installed():
                backend = "triton"
            else:
                backend = "native" if on_cpu and native.is_available() else "torch"
        if backend == "native":
            if not on_cpu:
                raise ValueError(f"native copies between CPU tensors only, not to {self.device}")
            native.load_library()
        if backend == "triton":
            triton_availability.require(self.device.type)
        return backend

    def _check_buffer(self, buffer: torch.Tensor) -> None:
        if buffer.dtype != self.dtype or buffer.dim() != 1 or buffer.device.type != "cpu":
            raise ValueError(
                f"the buffer must be a vector of {self.dtype} on the CPU, found {buffer.dtype} "
                f"{list(buffer.shape)} on {buffer.device}"
            )
        if not buffer.is_contiguous():
            raise ValueError("the buffer must be contiguous")

    def _check_index(
        self,
        buffer: torch.Tensor,
        rows: npt.NDArray[np.int64],
        a_ranks: npt.NDArray[np.int64],
        ranks: npt.NDArray[np.int64],
        a_offsets: npt.NDArray[np.int64],
        b_offsets: npt.NDArray[np.int64],
    ) -> None:
        shapes = {c.shape for c in (rows, a_ranks, ranks, a_offsets, b_offsets)}
        if len(shapes) > 1 or rows.ndim != 1:
            raise ValueError(f"the index must be five vectors of one length, found shapes {shapes}")
        if ((rows < 0) | (rows >= len(self._a))).any():
            raise ValueError(f"rows must lie in [0, {len(self._a)}), found {rows.tolist()}")
        for name, found, most in (
            ("a_ranks", a_ranks, self._a_places.lines[rows]),
            ("ranks", ranks, self._max_ranks[rows]),
        ):
            if ((found < 0) | (found > most)).any():
                raise ValueError(
                    f"{name} {found.tolist()} do not fit the slots, which hold {most.tolist()}"
                )
        for name, offsets, sizes in (
            ("a_offsets", a_offsets, a_ranks * self._a_places.length[rows]),
            ("b_offsets", b_offsets, ranks * self._outputs[rows]),
        ):
            if ((offsets < 0) | (offsets > buffer.numel() - sizes)).any():
                raise ValueError(
                    f"{name} {offsets.tolist()} reach outside the buffer of {buffer.numel()} "
                    f"elements"
                )

    def _pieces(
        self,
        slot: int,
        rows: npt.NDArray[np.int64],
        a_ranks: npt.NDArray[np.int64],
        ranks: npt.NDArray[np.int64],
        a_offsets: npt.NDArray[np.int64],
        b_offsets: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.void]:
        """[2n] of `PIECE`: A and B of each slice."""
        width = self.dtype.itemsize
        by_column = self._by_column[rows]
        pieces = np.empty((len(rows), 2), PIECE)
        for part, places, offsets, lines, length in (
            (0, self._a_places, a_offsets, a_ranks, self._a_places.length[rows]),
            (
                1,
                self._b_places,
                b_offsets,
                np.where(by_column, ranks, self._outputs[rows]),
                np.where(by_column, self._outputs[rows], ranks),
            ),
        ):
            piece = pieces[:, part]
            piece["source"] = offsets * width
            piece["target"] = places.base[rows] + slot * places.slot_stride[rows]
            piece["rows"] = lines
            piece["row_bytes"] = length * width
            piece["stride"] = places.line_stride[rows]
        return pieces.reshape(-1)

    def _scatter_torch(
        self,
        buffer: torch.Tensor,
        slot: int,
        rows: npt.NDArray[np.int64],
        a_ranks: npt.NDArray[np.int64],
        ranks: npt.NDArray[np.int64],
        a_offsets: npt.NDArray[np.int64],
        b_offsets: npt.NDArray[np.int64],
    ) -> None:
        staged = buffer.to(self.device, non_blocking=True)
        for s, a_rank, rank, a_at, b_at in np.stack(
            (rows, a_ranks, ranks, a_offsets, b_offsets), axis=1
        ).tolist():
            a = self._a[s][slot, :a_rank]
            a.copy_(staged[a_at : a_at + a.numel()].view(a.shape))
            b = self._b[s][slot, :, :rank]
            b = b.mT if self._by_column[s] else b
            b.copy_(staged[b_at : b_at + b.numel()].view(b.shape))


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
