"""Kinds of calls: all that decides which kernels run, except the number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

Operation = Literal["linear", "shrink", "expand"]


@dataclass(frozen=True)
class LayerKind:
    """Shapes, types and layout of one call of a layer, as of `multilora_kernels.lora_linear`.

    Attributes:
        operation: Both halves of the product, or one.
        slots: Number of adapter slots.
        inputs: Columns of x; of h, where the call expands.
        widths: Output columns of each slice; empty where the call shrinks.
        slices: Number of slices.
        a_rank: Rows of A; 0 where the call expands.
        b_rank: Columns of B; 0 where the call shrinks.
        weights, given, out: Types of the weights, of x or h, and of y or h.
        by_column: Whether B's columns are contiguous.
        columns: Columns of y; 0 where the call shrinks.
        offset: First column of y that the call writes.
        add_inputs: Whether y is added to.
    """

    operation: Operation
    slots: int
    inputs: int
    widths: tuple[int, ...]
    slices: int
    a_rank: int
    b_rank: int
    weights: str
    given: str
    out: str
    by_column: bool = False
    columns: int = 0
    offset: int = 0
    add_inputs: bool = True

    @classmethod
    def of_linear(
        cls,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        x: torch.dtype,
        y: torch.dtype,
        *,
        columns: int,
        add_inputs: bool = True,
    ) -> LayerKind:
        """A call of `PreparedLinear`, by its weights and the types of x and y."""
        return cls(
            "linear",
            a[0].size(0),
            a[0].size(-1),
            tuple(each.size(-2) for each in b),
            len(a),
            a[0].size(-2),
            b[0].size(-1),
            _name(a[0].dtype),
            _name(x),
            _name(y),
            _is_by_column(b),
            columns,
            add_inputs=add_inputs,
        )

    @classmethod
    def of_shrink(cls, a: Sequence[torch.Tensor], x: torch.dtype, h: torch.dtype) -> LayerKind:
        """A call of `PreparedShrink`."""
        slots, rank, inputs = a[0].size(0), a[0].size(-2), a[0].size(-1)
        names = _name(a[0].dtype), _name(x), _name(h)
        return cls("shrink", slots, inputs, (), len(a), rank, 0, *names)

    @classmethod
    def of_expand(
        cls,
        b: Sequence[torch.Tensor],
        h: torch.dtype,
        y: torch.dtype,
        *,
        columns: int,
        offset: int = 0,
        add_inputs: bool = True,
    ) -> LayerKind:
        """A call of `PreparedExpand`."""
        return cls(
            "expand",
            b[0].size(0),
            b[0].size(-1),
            tuple(each.size(-2) for each in b),
            len(b),
            0,
            b[0].size(-1),
            _name(b[0].dtype),
            _name(h),
            _name(y),
            _is_by_column(b),
            columns,
            offset,
            add_inputs,
        )

    @property
    def max_rank(self) -> int:
        """The highest rank that a slot may have."""
        return self.a_rank or self.b_rank

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Types of the weights, of what is given and of what is written."""
        weights, given, out = (getattr(torch, n) for n in (self.weights, self.given, self.out))
        return weights, given, out

    def describe(self) -> str:
        """A few words for people, such as `linear 4096 -> 4096+1024+1024`."""
        target = "+".join(map(str, self.widths)) if self.widths else f"rank {self.a_rank}"
        text = f"{self.operation} {self.inputs} -> {target}"
        return text if self.add_inputs else f"{text}, written apart"

    def as_json(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> LayerKind:
        """The kind that `as_json` described."""
        return cls(**{**fields, "widths": tuple(fields["widths"])})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_by_column(b: Sequence[torch.Tensor]) -> bool:
    return b[0].stride(-1) != 1 and b[0].stride(-2) == 1
