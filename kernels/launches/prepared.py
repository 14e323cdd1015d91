"""A layer's products, prepared once and run per batch: what a serving engine calls.

Weights are checked and described before the first batch. Compiled code calls all of them through
one operator, `multilora::prepared`, and names them by numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.backends import module_of, resolve
from multilora_kernels.checks import (
    DTYPES,
    check,
    check_factors,
    check_linear_weights,
    check_weights,
    checked_shape,
)
from multilora_kernels.factors import OutputFactors
from multilora_kernels.operators import Numbered, register
from multilora_kernels.plan import BatchPlan, PlanLayout
from multilora_kernels.skipping import tokens_to_skip

_numbered: Numbered[Prepared] = Numbered()


class Prepared(ABC):
    """What prepared calls have in common.

    Make one before, outside the compiled code, and keep it as long as that code may run. An
    instance must not be run by two threads at the same time. On GPUs what a launch needs, beside a
    batch's own tensors, is worked out once for each power of two of tokens and kept.

    Args:
        layout: the layout of the plans to come.
    """

    def __init__(self, layout: PlanLayout) -> None:
        self._layout = layout
        # Computes a batch, given as to `run`, if it is like the last one but for values and
        # addresses; returns whether it is. A backend's own, where it has one.
        self.run_again: Callable[..., bool] = _never
        self._number = _numbered.number(self)

    def __call__(self, out: torch.Tensor, given: torch.Tensor, plan: BatchPlan) -> None:
        """Computes a batch in place on `out`.

        Raises:
            ValueError: A shape, dtype or stride does not fit, or the plan has another layout.
        """
        if torch.compiler.is_compiling():
            _operator(out, given, plan.buffer, plan.host, self._number)
            return
        if self.run_again(out, given, plan.buffer):
            return
        if plan.layout is not self._layout and plan.layout != self._layout:
            raise ValueError(f"expected a plan of {self._layout}, found one of {plan.layout}")
        self.run(out, given, plan.buffer, plan.header)

    @abstractmethod
    def run(
        self,
        out: torch.Tensor,
        given: torch.Tensor,
        plan: torch.Tensor,
        header: npt.NDArray[np.int32],
    ) -> None:
        """As a call, by the plan's `buffer` and `header`.

        Raises:
            ValueError: A shape, dtype or stride does not fit.
        """


class PreparedLinear(Prepared):
    """`lora_linear` for one layer; called with y of shape [T, W], x of shape [T, K] and a plan.

    Args:
        lora_a, lora_b, ranks, scale, add_inputs, factors, backend: as for `lora_linear`. The
            tensors are kept, not copied: their contents may change between runs.
        layout: the layout of the plans to come.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """

    def __init__(
        self,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        ranks: torch.Tensor,
        layout: PlanLayout,
        *,
        scale: float = 1.0,
        add_inputs: bool = True,
        factors: OutputFactors | None = None,
        backend: str = "auto",
    ) -> None:
        backend = resolve(backend, ranks.device.type)
        check_linear_weights(lora_a, lora_b, ranks, layout)
        check_factors(factors, lora_b, layout, add_inputs)
        super().__init__(layout)
        self._columns = lora_a[0].size(-1)
        self._width = sum(b.size(-2) for b in lora_b)
        self._add_inputs = add_inputs
        self._run: Callable[..., None] = module_of(backend).prepare_linear(
            lora_a, lora_b, ranks, layout, scale, add_inputs, factors
        )
        self.run_again = getattr(self._run, "run_again", _never)

    def run(
        self,
        out: torch.Tensor,
        given: torch.Tensor,
        plan: torch.Tensor,
        header: npt.NDArray[np.int32],
    ) -> None:
        (rows, columns), (y_rows, y_columns) = checked_shape("x", given), checked_shape("y", out)
        if (
            columns != self._columns
            or y_columns < self._width
            or rows != y_rows
            or plan.size(0) != self._layout.size
        ):
            raise ValueError(
                f"expected x of shape [tokens, {self._columns}], y of shape [tokens, >= "
                f"{self._width}] and a plan of {self._layout.size} numbers; found "
                f"{list(given.shape)}, {list(out.shape)} and {plan.size(0)}"
            )
        if not (tokens := tokens_to_skip(header, out)):
            self._run(plan, x=given, y=out)
        elif not self._add_inputs:
            out[:tokens, : self._width].zero_()


def _never(*batch: object) -> bool:
    """In place of `run_again` of backends that have none."""
    return False


class PreparedShrink(Prepared):
    """`lora_shrink` for one layer; called with h of shape [slices, T, R], x [T, K] and a plan.

    Args:
        lora_a, ranks, scale, backend: as for `lora_shrink`; kept, not copied.
        layout: the layout of the plans to come.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """

    def __init__(
        self,
        lora_a: Sequence[torch.Tensor],
        ranks: torch.Tensor,
        layout: PlanLayout,
        *,
        scale: float = 1.0,
        backend: str = "auto",
    ) -> None:
        backend = resolve(backend, ranks.device.type)
        check(len(lora_a) > 0, "lora_a must have a slice", len(lora_a))
        check_weights("lora_a", lora_a, ranks, layout, columns=lora_a[0].size(-1))
        super().__init__(layout)
        self._slices, self._max_rank = len(lora_a), lora_a[0].size(-2)
        self._columns = lora_a[0].size(-1)
        self._run: Callable[..., None] = module_of(backend).prepare_shrink(
            lora_a, ranks, layout, scale
        )

    def run(
        self,
        out: torch.Tensor,
        given: torch.Tensor,
        plan: torch.Tensor,
        header: npt.NDArray[np.int32],
    ) -> None:
        rows, columns = checked_shape("x", given)
        if (
            columns != self._columns
            or out.shape != (self._slices, rows, self._max_rank)
            or out.stride(2) != 1
            or out.dtype not in DTYPES
            or plan.size(0) != self._layout.size
        ):
            raise ValueError(
                f"expected x of shape [tokens, {self._columns}], h of shape [{self._slices}, "
                f"tokens, {self._max_rank}] with contiguous rows and a plan of "
                f"{self._layout.size} numbers; found {list(given.shape)}, {list(out.shape)} of "
                f"{out.dtype} with strides {list(out.stride())}, and {plan.size(0)}"
            )
        if tokens := tokens_to_skip(header, out):
            out[:, :tokens].zero_()
        else:
            self._run(plan, x=given, h=out)


class PreparedExpand(Prepared):
    """`lora_expand` for one layer; called with y of shape [T, W], h [slices, T, R] and a plan.

    Args:
        lora_b, ranks, offset, add_inputs, backend: as for `lora_expand`; kept, not copied.
        layout: the layout of the plans to come.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """

    def __init__(
        self,
        lora_b: Sequence[torch.Tensor],
        ranks: torch.Tensor,
        layout: PlanLayout,
        *,
        offset: int = 0,
        add_inputs: bool = True,
        backend: str = "auto",
    ) -> None:
        backend = resolve(backend, ranks.device.type)
        check(len(lora_b) > 0, "lora_b must have a slice", len(lora_b))
        check(offset >= 0, "offset must not be negative", offset)
        max_rank = lora_b[0].size(-1)
        check_weights("lora_b", lora_b, ranks, layout, columns=max_rank, by_column=True)
        super().__init__(layout)
        self._slices, self._max_rank = len(lora_b), max_rank
        self._span = slice(offset, offset + sum(b.size(-2) for b in lora_b))
        self._add_inputs = add_inputs
        self._run: Callable[..., None] = module_of(backend).prepare_expand(
            lora_b, ranks, layout, offset, add_inputs
        )

    def run(
        self,
        out: torch.Tensor,
        given: torch.Tensor,
        plan: torch.Tensor,
        header: npt.NDArray[np.int32],
    ) -> None:
        rows, columns = checked_shape("y", out)
        if (
            columns < self._span.stop
            or given.shape != (self._slices, rows, self._max_rank)
            or given.stride(2) != 1
            or given.dtype not in DTYPES
            or plan.size(0) != self._layout.size
        ):
            raise ValueError(
                f"expected y of shape [tokens, >= {self._span.stop}], h of shape [{self._slices}, "
                f"tokens, {self._max_rank}] with contiguous rows and a plan of "
                f"{self._layout.size} numbers; found {list(out.shape)}, {list(given.shape)} of "
                f"{given.dtype} with strides {list(given.stride())}, and {plan.size(0)}"
            )
        if not (tokens := tokens_to_skip(header, out)):
            self._run(plan, h=given, y=out)
        elif not self._add_inputs:
            out[:tokens, self._span].zero_()


def _run_prepared(
    out: torch.Tensor,
    given: torch.Tensor,
    plan: torch.Tensor,
    host_plan: torch.Tensor,
    prepared: torch.Tensor,
) -> None:
    found = _numbered.layer(prepared)
    if not found.run_again(out, given, plan):
        found.run(out, given, plan, host_plan.numpy())


_operator = register("prepared", _run_prepared, "out")
