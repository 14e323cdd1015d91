"""Squared lengths of the rows of `W + s B A`, computed in memory reserved at the start.

With rows w of W and b of `s B`

    |w + b A|^2 = |w|^2 + 2 (w A^T) b^T + b (A A^T) b^T

and `W A^T` is the base layer's output for A's rows. By the time the first DoRA adapter comes, the
server has already given away all of the device's memory, so nothing here allocates any: rows and
columns are processed in as many blocks as the scratch memory requires.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from vllm_multilora.integration.attached import Attached

ROW_SQUARES: Attached[torch.Tensor] = Attached("row-squares")
"""The squared lengths of the rows of a linear layer whose weights vLLM has repacked."""

_ELEMENTS = 1 << 20  # of each block
_MIN_SQUARE = 1e-6  # of the base row's; a shorter row has no length that float32 could tell


class RowSquares:
    """Finds squared lengths, and keeps those of the base weights' rows.

    Args:
        modules: vLLM's layers with LoRA.
        columns: Where the outputs of each begin, slice by slice, among those of all, and where the
            last ends.
        device: Where the model runs.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        columns: Sequence[Sequence[int]],
        device: torch.device | str,
    ) -> None:
        self._modules, self._columns = modules, columns
        outputs = max((own[-1] for own in columns), default=0)
        widest = max((b - a for own in columns for a, b in pairwise(own)), default=0)
        ranks = [a.shape[-2] for module in modules for a in module.lora_a_stacked]
        self._max_rank = max(ranks, default=1)
        converted = [
            a.shape[-2] * a.shape[-1] * module.base_layer.params_dtype.itemsize
            for module in modules
            for a in module.lora_a_stacked
            if a.dtype != module.base_layer.params_dtype
        ]

        def memory(elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(elements, dtype=dtype, device=device)

        self._base = memory(outputs)
        self._known: set[int] = set()  # layers whose part of it is there
        self._least = memory(widest)
        self._rows, self._crossed, self._b = (memory(_ELEMENTS) for _ in range(3))
        self._products = memory(4 * _ELEMENTS, torch.uint8)
        self._gram = memory(self._max_rank**2)
        self._converted = memory(max(converted, default=0), torch.uint8)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    def forget(self) -> None:
        """The base model has other weights."""
        self._known.clear()

    def write(self, number: int, slot: int, index: int, rank: int, out: torch.Tensor) -> None:
        """Writes those of one slice, or of this rank's part of its rows.

        Args:
            number: The layer.
            slot: Where its A and B are.
            index: The slice among the layer's.
            rank: True rank of A and B, at least 1.
            out: float32 [outputs of the slice].
        """
        module, columns = self._modules[number], self._columns[number]
        base_layer = module.base_layer
        outputs = slice(*(column - columns[0] for column in columns[index : index + 2]))
        base = self._of_base(number)[outputs]
        a = module.lora_a_stacked[index][slot, 0, :rank]
        b = module.lora_b_stacked[index][slot, 0].mT[:rank]
        gram, rows = self._gram_of(a), self._as_input(a, base_layer)
        packed = None
        if base_layer.weight.dim() != 2:  # vLLM's layers for CPUs may have repacked it
            packed = base_layer.quant_method.apply(base_layer, rows, None)[:, outputs]
        step = _ELEMENTS // rank
        for first in range(0, len(out), step):
            part = slice(first, min(first + step, len(out)))
            count = part.stop - part.start
            crossed, own = (_block(each, rank, count) for each in (self._crossed, self._b))
            if packed is None:
                product = _block(self._products.view(rows.dtype), rank, count)
                torch.mm(rows, base_layer.weight[outputs][part].t(), out=product)
                crossed.copy_(product)
            else:
                crossed.copy_(packed[:, part])
            own.copy_(b[:, part])
            crossed.addmm_(gram, own, beta=2)
            own.mul_(crossed)
            torch.sum(own, dim=0, out=out[part])
        out.add_(base)
        # What is left of a row that an update takes away is rounding, another on each machine.
        least = self._least[: len(out)]
        torch.sub(out, base, alpha=_MIN_SQUARE, out=least)
        out.mul_(least.gt_(0))

    def _of_base(self, number: int) -> torch.Tensor:
        columns, layer = self._columns[number], self._modules[number].base_layer
        own = self._base[columns[0] : columns[-1]]
        if number not in self._known:
            if layer.weight.dim() == 2:
                write_row_squares(layer.weight, own, self._rows)
            else:
                squares = ROW_SQUARES.get(layer)
                assert squares is not None  # the layout has no such layers
                own.copy_(squares)
            self._known.add(number)
        return own

    def _gram_of(self, a: torch.Tensor) -> torch.Tensor:
        """A A^T in float32, [rank, rank]."""
        rank, inputs = a.shape
        gram = _block(self._gram, rank, rank).zero_()
        step = _ELEMENTS // rank
        for first in range(0, inputs, step):
            part = a[:, first : first + step]
            own = _block(self._rows, *part.shape).copy_(part)
            gram.addmm_(own, own.t())
        return gram

    def _as_input(self, a: torch.Tensor, base_layer: Any) -> torch.Tensor:
        if a.dtype == base_layer.params_dtype:
            return a
        return _block(self._converted.view(base_layer.params_dtype), *a.shape).copy_(a)


def keep_row_squares(layer: Any) -> None:
    """Keeps the squared lengths of a linear layer's rows, whose weights vLLM is about to repack."""
    weight = layer.weight
    squares = torch.empty(len(weight), dtype=torch.float32)
    write_row_squares(weight, squares, squares.new_empty(max(_ELEMENTS, weight.size(1))))
    ROW_SQUARES.set(layer, squares)


def write_row_squares(weight: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
    """Writes the squared lengths of rows.

    Args:
        weight: [rows, columns].
        out: float32 [rows].
        scratch: float32, as many elements as a row has or more.
    """
    step = max(len(scratch) // max(weight.size(1), 1), 1)
    for first in range(0, len(weight), step):
        part = weight[first : first + step].detach()
        own = _block(scratch, *part.shape).copy_(part)
        torch.sum(own.mul_(own), dim=1, out=out[first : first + step])


def _block(memory: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return memory[: rows * columns].view(rows, columns)
