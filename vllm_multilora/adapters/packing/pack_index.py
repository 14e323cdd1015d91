"""Where the parts of an adapter are in host memory: written once, with the adapter.

A *place* is one int64, `(k << 40) | offset`: `k` counts the pack's own segments, and the offset is
in bytes in that segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from multilora_kernels.dtypes import KERNEL_DTYPES, DType

_LENGTH_BYTES = 8
_BY_NAME = {dtype.name: dtype for dtype in KERNEL_DTYPES}
_KINDS = ("<i4", "<i4", "<i4", "<i8", "<i8", "<i8")  # of the columns of a `RankIndex`
# Ranks with their columns. Then tensors: names, dtypes, shapes, ranks, scalings; their places; the
# configuration.
_Wire = tuple[list[list[bytes]], list[tuple[str, str, list[int], int, float]], bytes, str]


class RankIndex(NamedTuple):
    """One worker's slices of an adapter.

    Attributes:
        rows: int32 [n], the rank tables' rows of the slices that the adapter has, ascending.
        ranks: int32 [n], their true ranks: the columns of B.
        a_ranks: int32 [n], the rows of A held here: the same unless the rank is sharded.
        a_places: int64 [n], where A [a_rank, inputs] begins.
        b_places: int64 [n], where B begins: [outputs, rank], or [rank, outputs] if the layout has
            columns first.
        magnitude_places: int64 [n], where the slice's magnitudes begin, float32 [outputs]; -1 where
            it has none.
    """

    rows: npt.NDArray[np.int32]
    ranks: npt.NDArray[np.int32]
    a_ranks: npt.NDArray[np.int32]
    a_places: npt.NDArray[np.int64]
    b_places: npt.NDArray[np.int64]
    magnitude_places: npt.NDArray[np.int64]


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it is in the checkpoint.

    Attributes:
        dtype: One of `KERNEL_DTYPES`.
        place: Where it begins; contiguous, row-major.
        rank: Of the module whose A or B it is; 0 if it is a module saved whole.
        scaling: The factor of that module's B @ A.
    """

    dtype: DType
    shape: tuple[int, ...]
    place: int
    rank: int = 0
    scaling: float = 1.0


@dataclass(frozen=True)
class PackIndex:
    """What a pack holds.

    Attributes:
        ranks: What each of this machine's workers fills its slots from.
        tensors: For layers that vLLM fills itself: tensors by their names in the checkpoint.
        config: For the same layers: what vLLM reads of `adapter_config.json`, as JSON; empty
            where there are no such tensors.
    """

    ranks: tuple[RankIndex, ...]
    tensors: Mapping[str, RawTensor] = field(default_factory=dict)
    config: str = ""

    def encode(self) -> bytes:
        """The index as bytes, which begin with their own length; as many whatever the places."""
        places = np.array([tensor.place for tensor in self.tensors.values()], "<i8")
        wire: _Wire = (
            [
                [
                    np.ascontiguousarray(column, kind).tobytes()
                    for column, kind in zip(rank, _KINDS, strict=True)
                ]
                for rank in self.ranks
            ],
            [
                (name, raw.dtype.name, list(raw.shape), raw.rank, raw.scaling)
                for name, raw in self.tensors.items()
            ],
            places.tobytes(),
            self.config,
        )
        content = msgspec.msgpack.encode(wire)
        return len(content).to_bytes(_LENGTH_BYTES, "little") + content

    @classmethod
    def decode(cls, content: bytes | memoryview) -> PackIndex:
        """Reads an index; what lies after it is passed over; raises `ValueError` if it is none."""
        view = memoryview(content)
        length = int.from_bytes(view[:_LENGTH_BYTES], "little")
        text = view[_LENGTH_BYTES : _LENGTH_BYTES + length]
        try:
            ranks, entries, places, config = msgspec.msgpack.decode(text, type=_Wire)
            spots = np.frombuffer(places, "<i8").tolist()
            tensors = {
                name: RawTensor(_BY_NAME[dtype], tuple(shape), place, rank, scaling)
                for (name, dtype, shape, rank, scaling), place in zip(entries, spots, strict=True)
            }
            return cls(tuple(map(_rank, ranks)), tensors, config)
        except (msgspec.MsgspecError, KeyError, ValueError) as error:
            raise ValueError(f"not an adapter's index: {error}") from error


def _rank(columns: list[bytes]) -> RankIndex:
    arrays = [np.frombuffer(column, kind) for column, kind in zip(columns, _KINDS, strict=True)]
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"columns of different lengths: {[len(array) for array in arrays]}")
    return RankIndex(*arrays)
