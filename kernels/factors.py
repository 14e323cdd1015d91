"""Factors of a layer's outputs, which some adapters have beside A and B (DoRA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OutputFactors:
    """What a layer's outputs, base product and adapter's together, are multiplied by.

    *Semantics*, after the product has been added to y, where `marks[i, slot]` is not 0::

        y[t, n] += values[slot, n] * (y[t, n] - bias[n])

    So a value is the factor minus 1, and the base layer's own bias keeps its size. Rows whose mark
    is 0, and those of rank 0, stay as they are, to the bit.

    Attributes:
        values: float32 [slots, N], N the widths of all slices together; contiguous rows.
        marks: int32 [slices, slots]; contiguous rows.
        bias: float32 [N]: what the base layer has added to y; None: nothing.
    """

    values: torch.Tensor
    marks: torch.Tensor
    bias: torch.Tensor | None = None

    def check(self, slices: int, slots: int, width: int) -> None:
        """Checks the shapes.

        Raises:
            ValueError: One does not fit; the message names it.
        """
        for name, tensor, shape, dtype in (
            ("values", self.values, (slots, width), torch.float32),
            ("marks", self.marks, (slices, slots), torch.int32),
            ("bias", self.bias, (width,), torch.float32),
        ):
            if tensor is None:
                continue
            if tensor.shape != shape or tensor.dtype != dtype or tensor.stride(-1) != 1:
                raise ValueError(
                    f"factors.{name} must be {dtype} of shape {list(shape)} with contiguous rows, "
                    f"found {tensor.dtype} of shape {list(tensor.shape)}, strides "
                    f"{list(tensor.stride())}"
                )
