"""Which parts of a checkpoint become which blocks of a pack."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from multilora_kernels.dtypes import FLOAT32, DType
from multilora_kernels.packs.packing import CONVERT, RAW, TRANSPOSE
from vllm_multilora.adapters.files.one_pass import TensorPart
from vllm_multilora.adapters.files.tensor_file import TensorFile
from vllm_multilora.adapters.model.layout import BLOCK_BYTES, ModelLayout, SliceLayout
from vllm_multilora.adapters.packing.applied import Applied, MatchedModule, judged
from vllm_multilora.adapters.packing.pack_index import PackIndex, RankIndex, RawTensor

_Ints = npt.NDArray[np.int64]


class PackPlan:
    """The blocks of a pack: A, B, magnitudes of each worker's slices, raw tensors, and the index.

    Several adapters, as those of a blend, have the ranks of a slice side by side. Magnitudes and
    raw tensors are those of one adapter alone.

    Args:
        applied: For each adapter, what of it is applied by each worker.
        config: What vLLM reads of the configuration, as JSON, where there are raw tensors.

    Attributes:
        parts: For each adapter, what is to be packed, and then what is only to be judged.
        rank: The largest rank of a slice, all adapters together.
        has_raw: Whether there are tensors for layers that vLLM fills itself.
        sizes: int64 [n], bytes of the blocks, the index last.
        block_bytes: int64 [n], the same, rounded up to whole cache lines, at least one.
    """

    def __init__(
        self,
        files: Sequence[TensorFile],
        layouts: Sequence[ModelLayout],
        applied: Sequence[Sequence[Applied]],
        config: str = "",
    ) -> None:
        self._files = files
        self.parts: list[list[TensorPart]] = [[] for _ in files]
        # Of each adapter's packed parts, the block that each goes to, and how many bytes into it.
        self._goals: list[tuple[list[int], list[int]]] = [([], []) for _ in files]
        self._blocks: list[int] = []  # their bytes
        self._workers: list[_Slices] = []
        self.rank = 0
        for worker, layout in enumerate(layouts):
            self._add(layout, [of[worker] for of in applied])
        self._raw = {part.tensor: part for of in applied[0] for part in of.raw}
        self.has_raw = bool(self._raw)
        self._config = config if self._raw else ""
        factors = {name: factor for of in applied[0] for name, factor in of.factors}
        for name in self._raw:
            info = files[0].tensors[name]
            raw = TensorPart(name, layouts[0].dtype, factors.get(name, 1.0), kind=RAW)
            self._put(0, raw, self._block(info.end - info.begin))
        index = len(self.index(np.zeros(len(self._blocks) + 1, np.int64)).encode())
        self.sizes: _Ints = np.array([*self._blocks, index], np.int64)
        self.block_bytes: _Ints = np.maximum(-(-self.sizes // BLOCK_BYTES), 1) * BLOCK_BYTES
        for file, parts, of in zip(files, self.parts, applied, strict=True):
            parts += _unpacked(file, parts, layouts, of)

    def index(self, places: _Ints) -> PackIndex:
        """The index of a pack whose blocks lie at these places; [n], the index's own is unused."""
        ranks, first = [], 0
        for slices in self._workers:
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
            info = self._files[0].tensors[raw.tensor]
            tensors[raw.tensor] = RawTensor(info.dtype, info.shape, place, raw.rank, raw.scaling)
        return PackIndex(tuple(ranks), tensors, self._config)

    def write_index(self, addresses: _Ints, places: _Ints) -> None:
        """Writes the index into the last block; arguments and errors as of `Intake.read`."""
        blocks = len(self.sizes)
        if len(addresses) != blocks or len(places) != blocks:
            raise ValueError(
                f"the pack has {blocks} blocks, found {len(addresses)} addresses and "
                f"{len(places)} places"
            )
        content = self.index(places).encode()
        ctypes.memmove(int(addresses[-1]), content, len(content))

    def targets(self, adapter: int, addresses: _Ints | None) -> _Ints | None:
        """Where each of an adapter's `parts` goes, of blocks at these places; 0: it is judged."""
        if addresses is None:
            return None
        blocks, offsets = (np.array(each, np.int64) for each in self._goals[adapter])
        targets = np.zeros(len(self.parts[adapter]), np.int64)
        targets[: len(blocks)] = addresses[blocks] + offsets
        return targets

    def _add(self, layout: ModelLayout, applied: Sequence[Applied]) -> None:
        """Plans what one worker keeps of each adapter."""
        found: dict[int, list[tuple[SliceLayout, int, MatchedModule]]] = {}
        for adapter, of in enumerate(applied):
            for module in of.modules:
                for part in layout.by_name[module.name]:
                    found.setdefault(part.row, []).append((part, adapter, module))
        slices = _Slices()
        for row in sorted(found):
            self._add_slice(layout, slices, found[row])
        for number, row in enumerate(slices.rows):
            part, adapter, module = found[row][0]
            if module.magnitude is not None:
                first, last = rows = module.rows_of(part)
                slices.scaled.append(number)
                magnitude = TensorPart(module.magnitude, FLOAT32, rows=rows)
                self._put(adapter, magnitude, self._block((last - first) * FLOAT32.itemsize))
        self._workers.append(slices)

    def _add_slice(
        self,
        layout: ModelLayout,
        slices: _Slices,
        modules: Sequence[tuple[SliceLayout, int, MatchedModule]],
    ) -> None:
        """Puts the ranks of all adapters that have a slice side by side."""
        of = modules[0][0]
        rank = sum(module.rank for _, _, module in modules)
        first, last = of.rows_of_a(rank)  # that this worker keeps
        inputs = of.input_range[1] - of.input_range[0]
        outputs = of.output_range[1] - of.output_range[0]
        width, at = layout.dtype.itemsize, 0
        a_block = self._block((last - first) * inputs * width)
        b_block = self._block(outputs * rank * width)
        for _, adapter, module in modules:
            low, high = max(first, at), min(last, at + module.rank)
            if low < high:
                rows = low - at, high - at
                a = TensorPart(module.a_name, layout.dtype, rows=rows, columns=of.input_range)
                self._put(adapter, a, a_block, (low - first) * inputs * width)
            b = TensorPart(
                module.b_name,
                layout.dtype,
                module.scaling,
                rows=module.rows_of(of),
                columns=(0, module.rank),
                kind=TRANSPOSE if layout.columns_first else CONVERT,
                stride=None if layout.columns_first else rank,
            )
            self._put(adapter, b, b_block, at * (outputs if layout.columns_first else 1) * width)
            at += module.rank
        slices.rows.append(of.row)
        slices.ranks.append(rank)
        slices.a_ranks.append(last - first)
        self.rank = max(self.rank, rank)

    def _block(self, size: int) -> int:
        """A new block's number."""
        self._blocks.append(size)
        return len(self._blocks) - 1

    def _put(self, adapter: int, part: TensorPart, block: int, offset: int = 0) -> None:
        self.parts[adapter].append(part)
        blocks, offsets = self._goals[adapter]
        blocks.append(block)
        offsets.append(offset)


class _Slices:
    """One worker's slices, in the order of the rank tables' rows; `scaled` have magnitudes."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ranks: list[int] = []
        self.a_ranks: list[int] = []
        self.scaled: list[int] = []


def _unpacked(
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
