"""Which parts of a checkpoint become which blocks of a pack."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from multilora_kernels.dtypes import FLOAT32, DType
from multilora_kernels.packs.packing import CONVERT, RAW, TRANSPOSE
from vllm_multilora.adapters.checks.matching import MatchedModule
from vllm_multilora.adapters.files.one_pass import TensorPart
from vllm_multilora.adapters.files.tensor_file import TensorFile
from vllm_multilora.adapters.model.layout import BLOCK_BYTES, ModelLayout, SliceLayout
from vllm_multilora.adapters.packing.applied import Applied, judged
from vllm_multilora.adapters.packing.pack_index import PackIndex, RankIndex, RawTensor

_Ints = npt.NDArray[np.int64]


class BlockPlan(Protocol):
    """What there is to say of the blocks of any pack.

    Attributes:
        sizes: int64 [n], bytes of the blocks, the index last.
    """

    sizes: _Ints

    def index(self, places: _Ints) -> PackIndex:
        """The index of a pack whose blocks lie at these places."""


def padded_sizes(plan: BlockPlan) -> _Ints:
    """int64 [n], the blocks' sizes rounded up to whole cache lines, at least one."""
    return np.maximum(-(-plan.sizes // BLOCK_BYTES), 1) * BLOCK_BYTES


def write_index(plan: BlockPlan, addresses: _Ints, places: _Ints) -> None:
    """Writes a pack's index into the last of its blocks; arguments as of `Intake.read`.

    Raises:
        ValueError: As many addresses and places as blocks are needed.
    """
    blocks = len(plan.sizes)
    if len(addresses) != blocks or len(places) != blocks:
        raise ValueError(
            f"the pack has {blocks} blocks, found {len(addresses)} addresses and "
            f"{len(places)} places"
        )
    content = plan.index(places).encode()
    ctypes.memmove(int(addresses[-1]), content, len(content))


class PackPlan:
    """The blocks of a pack: A, B, magnitudes of each worker's slices, raw tensors, and the index.

    Args:
        file: The tensors.
        layouts: What each worker keeps.
        applied: For each of them, what of the adapter is applied there.
        config: What vLLM reads of the configuration, as JSON, where there are raw tensors.

    Attributes:
        parts: What is to be packed or judged; the first of them are the blocks, in their order,
            without the index.
        sizes: int64 [n], bytes of the blocks, the index last.
    """

    def __init__(
        self,
        file: TensorFile,
        layouts: Sequence[ModelLayout],
        applied: Sequence[Applied],
        config: str,
    ) -> None:
        self._file = file
        self._ranks: list[_Slices] = []
        self.parts: list[TensorPart] = []
        for layout, of in zip(layouts, applied, strict=True):
            slices = _Slices(layout, of)
            self._ranks.append(slices)
            self.parts += slices.blocks()
        factors = {name: factor for of in applied for name, factor in of.factors}
        self._raw = {part.tensor: part for of in applied for part in of.raw}
        self._config = config if self._raw else ""
        self.parts += [
            TensorPart(name, layouts[0].dtype, factors.get(name, 1.0), kind=RAW)
            for name in self._raw
        ]
        self.blocks = len(self.parts)
        sizes = [self._bytes(part) for part in self.parts]
        index = len(self.index(np.zeros(self.blocks + 1, np.int64)).encode())
        self.sizes: _Ints = np.array([*sizes, index], np.int64)
        self.parts += unpacked(file, self.parts, layouts, applied)

    @property
    def has_raw(self) -> bool:
        """Whether there are tensors for layers that vLLM fills itself."""
        return bool(self._raw)

    def index(self, places: _Ints) -> PackIndex:
        """The index of a pack whose blocks lie at these places; [n], the index's own is unused."""
        ranks, first = [], 0
        for slices in self._ranks:
            last = first + 2 * len(slices.rows)
            end = last + len(slices.scaled)
            magnitudes = np.full(len(slices.rows), -1, np.int64)
            magnitudes[slices.scaled] = places[last:end]
            ranks.append(
                RankIndex(
                    np.array(slices.rows, np.int32),
                    np.array(slices.ranks, np.int32),
                    np.array(slices.a_ranks, np.int32),
                    places[first:last:2],
                    places[first + 1 : last : 2],
                    magnitudes,
                )
            )
            first = end
        tensors = {}
        for raw, place in zip(self._raw.values(), places[first:].tolist(), strict=False):
            info = self._file.tensors[raw.tensor]
            tensors[raw.tensor] = RawTensor(info.dtype, info.shape, place, raw.rank, raw.scaling)
        return PackIndex(tuple(ranks), tensors, self._config)

    def _bytes(self, part: TensorPart) -> int:
        if part.rows is None:
            info = self._file.tensors[part.tensor]
            return info.end - info.begin
        rows, columns = part.rows[1] - part.rows[0], part.columns[1] - part.columns[0]
        return rows * columns * part.dtype.itemsize


class _Slices:
    """What one worker keeps of an adapter's modules."""

    def __init__(self, layout: ModelLayout, applied: Applied) -> None:
        kept = [
            (part, module) for module in applied.modules for part in layout.by_name[module.name]
        ]
        kept.sort(key=lambda item: item[0].row)
        self._layout = layout
        self._kept = kept
        self.rows = [part.row for part, _ in kept]
        self.ranks = [module.rank for _, module in kept]
        self.a_ranks = [last - first for first, last in (p.rows_of_a(m.rank) for p, m in kept)]
        self.scaled = [i for i, (_, module) in enumerate(kept) if module.magnitude is not None]

    def blocks(self) -> Iterator[TensorPart]:
        """A and B of each slice, then the magnitudes of those that have some."""
        for part, module in self._kept:
            yield from self._pair(part, module)
        for part, module in self._kept:
            if module.magnitude is not None:
                yield TensorPart(module.magnitude, FLOAT32, rows=module.rows_of(part))

    def _pair(self, part: SliceLayout, module: MatchedModule) -> tuple[TensorPart, TensorPart]:
        dtype = self._layout.dtype
        a = TensorPart(
            module.a_name,
            dtype,
            rows=part.rows_of_a(module.rank),
            columns=part.input_range,
        )
        b = TensorPart(
            module.b_name,
            dtype,
            module.scaling,
            rows=module.rows_of(part),
            columns=(0, module.rank),
            kind=TRANSPOSE if self._layout.columns_first else CONVERT,
        )
        return a, b


def unpacked(
    file: TensorFile,
    packed: Sequence[TensorPart],
    layouts: Sequence[ModelLayout],
    applied: Sequence[Applied],
) -> list[TensorPart]:
    """What is to be judged besides: tensors of which the workers here do not keep every value."""
    kept: dict[tuple[str, DType, float], list[TensorPart]] = {}
    for part in packed:
        kept.setdefault((part.tensor, part.dtype, part.scale), []).append(part)
    return [
        whole
        for whole in judged(applied, layouts)
        if not _covers(
            kept.get((whole.tensor, whole.dtype, whole.scale), []),
            file.tensors[whole.tensor].shape,
        )
    ]


def _covers(parts: Sequence[TensorPart], shape: tuple[int, ...]) -> bool:
    """Whether parts hold every value of a tensor; False where that is not easily seen."""
    if any(part.rows is None for part in parts):
        return True
    if len(shape) == 1:
        return _fills([part.rows for part in parts if part.rows], shape[0])
    if len(shape) != 2:
        return False
    rows, columns = {part.rows for part in parts}, {part.columns for part in parts}
    if columns == {(0, shape[1])}:
        return _fills([span for span in rows if span], shape[0])
    return rows == {(0, shape[0])} and _fills(list(columns), shape[1])


def _fills(spans: list[tuple[int, int]], size: int) -> bool:
    at = 0
    for first, last in sorted(spans):
        if first > at:
            return False
        at = max(at, last)
    return at >= size
