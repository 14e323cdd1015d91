"""The factors that DoRA adapters apply to layers' outputs: magnitude over norm, by slot and output.

A DoRA adapter (https://arxiv.org/abs/2402.09353) scales each row of `W + s B A` to a length of its
own, its magnitude. The unscaled length of each row is computed here, from the running model's
weights (`RowSquares`), in the worker's main thread, before the first step that needs it. All ranks
are at the same step then, so that row-parallel layers, where each rank has a part of every row, can
add up their parts. And no step runs in parallel, which vLLM's layers for CPUs could not handle.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm import envs
from vllm.distributed import get_tp_group
from vllm.lora.layers import (
    ColumnParallelLinearWithShardedLoRA,
    MergedColumnParallelLinearWithShardedLoRA,
    MergedQKVParallelLinearWithShardedLoRA,
    QKVParallelLinearWithShardedLoRA,
    RowParallelLinearWithShardedLoRA,
)
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod

from multilora_kernels import OutputFactors
from multilora_kernels.packs.pieces import host_bytes
from vllm_multilora.integration.step.staged_rows import SlotColumns
from vllm_multilora.integration.worker.model.row_squares import ROW_SQUARES, RowSquares

_KEPT_BYTES = 256 << 20  # of host memory, for the factors of adapters that come back


@dataclass(frozen=True)
class _Layer:
    """A layer's place in the tables.

    Attributes:
        module: vLLM's layer with LoRA.
        rows: Its slices, in all slices of the model.
        columns: Where its outputs begin, slice by slice, and where the last ends.
        bias: float32 [outputs], a copy of what the base layer adds on this rank; None: nothing.
    """

    module: Any
    rows: range
    columns: tuple[int, ...]
    bias: torch.Tensor | None

    @property
    def is_part(self) -> bool:
        """Whether this rank has a part of every row of the weights."""
        return isinstance(self.module.base_layer, RowParallelLinear) and self.module.tp_size > 1


@dataclass(frozen=True)
class _Adapter:
    """A DoRA adapter in a slot.

    Attributes:
        ranks: The rank of each slice that it has magnitudes for, by the slice's row.
        magnitudes: float32 [all outputs], in host memory: for the case that the base model gets
            other weights.
    """

    ranks: dict[int, int]
    magnitudes: torch.Tensor


class SlotFactors:
    """The factors of all linear layers' outputs in every slot.

    All device memory is allocated here, at the start. Filling may run on any thread, like all of
    filling a slot; everything else is for the worker's main thread, where all ranks of a
    tensor-parallel group do the same in the same order.
    """

    def __init__(self, layers: Iterable[Any], slots: int, device: torch.device | str) -> None:
        self._layers: list[_Layer] = []
        rows = columns = 0
        for module in layers:
            ends = [columns]
            for b in module.lora_b_stacked:
                ends.append(ends[-1] + b.shape[-2])
            bias = _added_bias(module)
            if bias is not None:
                bias = torch.empty_like(bias, dtype=torch.float32).copy_(bias)
            own = range(rows, rows + module.n_slices)
            self._layers.append(_Layer(module, own, tuple(ends), bias))
            rows, columns = own.stop, ends[-1]
        starts = [start for layer in self._layers for start in layer.columns[:-1]]
        self._starts = np.array([*starts, columns], np.int64)
        self._values = torch.zeros(slots, columns, dtype=torch.float32, device=device)
        self._marks = torch.zeros(rows, slots, dtype=torch.int32, device=device)
        self._mark_columns = SlotColumns((self._marks,))
        self._adapters: dict[int, _Adapter] = {}
        self._digests: dict[int, str] = {}  # of these
        self._unfinished: set[int] = set()
        self._squares = RowSquares(
            [layer.module for layer in self._layers],
            [layer.columns for layer in self._layers],
            device,
        )
        self._lengths = torch.empty(columns, dtype=torch.float32, device=device)
        in_parts = sum(
            layer.columns[-1] - layer.columns[0] for layer in self._layers if layer.is_part
        )
        # What all ranks add up; other ranks' parts of rows are not among `_lengths` until then.
        self._parts = torch.zeros(in_parts, dtype=torch.float32, device=device)
        if self._parts.device.type not in ("cpu", "meta"):
            self._add_up_parts()  # makes the connections, which take memory too
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._most_known = max(slots, _KEPT_BYTES // max(self._values[:1].nbytes, 1))

    @property
    def nbytes(self) -> int:
        biases = sum(layer.bias.nbytes for layer in self._layers if layer.bias is not None)
        lengths = self._squares.nbytes + self._lengths.nbytes + self._parts.nbytes
        return self._values.nbytes + self._marks.nbytes + biases + lengths

    def of_layer(self, index: int) -> OutputFactors:
        """What a layer's kernels take, by the layer's place among all."""
        layer = self._layers[index]
        return OutputFactors(
            self._values[:, layer.columns[0] : layer.columns[-1]],
            self._marks[layer.rows.start : layer.rows.stop],
            layer.bias,
        )

    def begin(self, slot: int, digest: str | None) -> torch.Tensor | None:
        """A slot is going to be filled.

        Args:
            slot: The slot.
            digest: Of the DoRA adapter that is to be in it; None: of another kind.

        Returns:
            The adapter's factors, if they are known; `fill` is to be given them.
        """
        self._unfinished.discard(slot)
        if digest is None:
            return None
        self._digests[slot] = digest
        if digest in self._known:
            self._known.move_to_end(digest)
        else:
            self._unfinished.add(slot)
        return self._known.get(digest)

    def fill(
        self,
        slot: int,
        rows: npt.NDArray[np.int32],
        ranks: npt.NDArray[np.int32],
        addresses: npt.NDArray[np.int64],
        known: torch.Tensor | None,
    ) -> None:
        """Fills a slot, with magnitudes for `finish` where the factors are not known.

        Args:
            slot: The slot.
            rows: [n], the slices that the adapter has magnitudes for.
            ranks: [n], their ranks.
            addresses: [n], where these begin in host memory: float32 [outputs].
            known: What `begin` has returned.
        """
        self._adapters.pop(slot, None)
        marks = np.zeros(len(self._marks), np.int32)
        marks[rows] = 1
        if len(rows):
            magnitudes = self._magnitudes(rows, addresses)
            of_rows = dict(zip(rows.tolist(), ranks.tolist(), strict=True))
            self._adapters[slot] = _Adapter(of_rows, magnitudes)
            self._values[slot].copy_(magnitudes if known is None else known)
        self._mark_columns.write(slot, marks)

    def _magnitudes(
        self, rows: npt.NDArray[np.int32], addresses: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        vector = torch.zeros(self._values.size(1), dtype=torch.float32)
        for row, address in zip(rows.tolist(), addresses.tolist(), strict=True):
            own = vector[self._starts[row] : self._starts[row + 1]]
            own.copy_(host_bytes(address, own.nbytes).view(torch.float32))
        return vector

    def finish(self, slots: Iterable[int]) -> None:
        """Makes factors of the magnitudes in those of these slots that `fill` left so.

        A row without length has no factor: it is infinite or NaN, as in PEFT, and so is whatever
        the adapter answers.
        """
        for slot in slots if self._unfinished else ():
            if slot not in self._unfinished:
                continue
            self._unfinished.discard(slot)
            if slot not in self._adapters:
                # It has no magnitudes on this stage of the pipeline, whose ranks all have the same
                # layers: none of them is left waiting for another's part.
                continue
            self._finish(slot)
            self._known[self._digests[slot]] = self._values[slot].to("cpu", copy=True)
            if len(self._known) > self._most_known:
                self._known.popitem(last=False)

    @torch.no_grad()
    def _finish(self, slot: int) -> None:
        ranks = self._adapters[slot].ranks
        self._lengths.fill_(1)
        self._parts.zero_()
        summed: list[tuple[torch.Tensor, torch.Tensor]] = []
        first_part = 0
        for number, layer in enumerate(self._layers):
            for index, row in enumerate(layer.rows):
                own = self._lengths[self._starts[row] : self._starts[row + 1]]
                if layer.is_part:
                    whole, own = own, self._parts[first_part : first_part + len(own)]
                    first_part += len(own)
                    if row in ranks:
                        summed.append((whole, own))
                if row in ranks:
                    self._squares.write(number, slot, index, ranks[row], own)
        if summed:
            self._add_up_parts()
            for whole, own in summed:
                whole.copy_(own)
        self._values[slot].div_(self._lengths.clamp_(min=0).sqrt_()).sub_(1)

    def _add_up_parts(self) -> None:
        """Sums over the ranks in place; vLLM's own would return another tensor."""
        if len(self._parts):
            torch.distributed.all_reduce(self._parts, group=get_tp_group().device_group)

    def weights_changed(self) -> None:
        """The base model has other weights: `finish` is to be called before the next step."""
        self._squares.forget()
        self._known.clear()
        for layer in self._layers:
            bias = _added_bias(layer.module)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        for slot, adapter in self._adapters.items():
            self._values[slot].copy_(adapter.magnitudes)
            self._unfinished.add(slot)

    def memory_lost(self) -> None:
        """The device's memory was lost; what was in the slots, too."""
        self._adapters.clear()
        self._unfinished.clear()
        self._marks.zero_()
        self._values.zero_()
        self.weights_changed()


def no_factors(module: Any) -> str | None:
    """Why a layer's outputs cannot be multiplied; None if they can."""
    base = module.base_layer
    method = base.quant_method
    if not isinstance(method, UnquantizedLinearMethod):
        return f"its weights are quantised ({type(method).__name__})"
    if base.weight.dim() != 2 and ROW_SQUARES.get(base) is None:
        return "vLLM has repacked its weights"
    if is_sharded(module):
        return "--fully-sharded-loras computes products in halves, which multiply nothing"
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        return "VLLM_LORA_ENABLE_DUAL_STREAM computes products beside the base's"
    return None


def _added_bias(module: Any) -> torch.Tensor | None:
    """What the base layer has added to the outputs that an adapter meets, on this rank."""
    base = module.base_layer
    if getattr(base, "skip_bias_add", False):
        return None
    if isinstance(base, RowParallelLinear) and module.tp_rank > 0:
        return None
    return getattr(base, "bias", None)


_SHARDED = (
    ColumnParallelLinearWithShardedLoRA,
    MergedColumnParallelLinearWithShardedLoRA,
    MergedQKVParallelLinearWithShardedLoRA,
    QKVParallelLinearWithShardedLoRA,
    RowParallelLinearWithShardedLoRA,
)


def is_sharded(layer: object) -> bool:
    """Whether a layer is one of those of `--fully-sharded-loras`, on any number of ranks.

    They compute the two halves of a product separately, with communication in between.
    """
    return isinstance(layer, _SHARDED)


def first_column(layer: Any) -> int:
    """Where a sharded layer's own part of the outputs begins."""
    if isinstance(layer, RowParallelLinearWithShardedLoRA):
        return int(layer.tp_rank * layer.lora_b_stacked[0].shape[-2])
    return 0
