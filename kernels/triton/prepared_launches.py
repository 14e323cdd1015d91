"""A layer's launches, worked out once for each range of token counts and repeated per batch.

Blocks, constants and options follow from the weights and from the number of tokens rounded up to
a power of two. A layer has the same weights in every step, so they are looked up; what a step
brings are tensors, the tokens and the number of programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multilora_kernels.configs.config_facts import power_of_two_up
from multilora_kernels.factors import OutputFactors
from multilora_kernels.plan import PlanLayout
from multilora_kernels.triton.activations import (
    aligned,
    aligned_h,
    aligned_output,
    fits,
    row_step,
)
from multilora_kernels.triton.combine import prepare_combine
from multilora_kernels.triton.kept_launch import KeptLaunch, current_stream
from multilora_kernels.triton.launch import Batch, DeviceFacts
from multilora_kernels.triton.product import expand_launch, shrink_launch
from multilora_kernels.triton.shrink import kept_type

_SHRINK = ("planes", "x", "x_row", "plan", "tokens")
_COMBINE = ("h", "h_slice", "planes", "plan", "tokens")
_EXPAND = ("y", "y_row", "planes", "plan", "tokens")

_Key = tuple[int, torch.dtype, torch.dtype]


@dataclass(frozen=True)
class _Launches:
    """What all batches of a range of token counts share.

    Attributes:
        shrink, combine, expand: The kernels.
        parts: Parts of K.
        plane_type, kept: The types of the planes and, if they are added up, of their sum.
        h_grain: Elements that `combine` counts as one.
    """

    shrink: KeptLaunch
    combine: KeptLaunch | None
    expand: KeptLaunch
    parts: int
    plane_type: torch.dtype
    kept: torch.dtype
    h_grain: int = 1

    @property
    def are_compiled(self) -> bool:
        """Whether nothing of Triton is needed."""
        # The last one is compiled last.
        return self.expand.is_compiled


class PreparedLaunches:
    """`lora_linear` for one layer; see `multilora_kernels.PreparedLinear`.

    Args:
        lora_a, lora_b, ranks, layout, scale, add_inputs, factors: as there, and valid.
        facts: The device.
        batch_invariant: Whether the blocks must not depend on the number of tokens.
    """

    def __init__(
        self,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        ranks: torch.Tensor,
        layout: PlanLayout,
        scale: float,
        add_inputs: bool,
        facts: DeviceFacts,
        batch_invariant: bool,
        factors: OutputFactors | None = None,
    ) -> None:
        self._lora_a, self._lora_b, self._ranks = tuple(lora_a), tuple(lora_b), ranks
        self._layout, self._scale, self._add_inputs = layout, scale, add_inputs
        self._facts, self._batch_invariant = facts, batch_invariant
        self._factors = factors
        self._slices, self._max_rank = len(self._lora_a), lora_a[0].size(-2)
        self._known: dict[_Key, _Launches] = {}

    def run(self, plan: torch.Tensor, *, x: torch.Tensor, y: torch.Tensor) -> None:
        """Computes a batch in place on y; arguments are valid."""
        tokens = x.size(0)
        if not tokens:
            return
        x_at, y_at = x.data_ptr(), y.data_ptr()
        # One row begins where it begins, whatever lies behind it.
        x_row, y_row = (x.stride(0), y.stride(0)) if tokens > 1 else (0, 0)
        rows = x_row | y_row
        if not fits(x_at | y_at | rows, rows):
            with aligned_output(y, 0) as (own, _):
                self.run(plan, x=aligned(x), y=own)
            return
        key = power_of_two_up(tokens), x.dtype, y.dtype
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._work_out(plan, x, y)
        device = x.device
        planes = torch.empty(
            (known.parts, self._slices, tokens, self._max_rank),
            dtype=known.plane_type,
            device=device,
        )
        h, combine = None, known.combine
        if combine is not None:
            h = torch.empty(planes.shape[1:], dtype=known.kept, device=device)
        if known.are_compiled:
            plan_at, planes_at, stream = plan.data_ptr(), planes.data_ptr(), current_stream()
            known.shrink.run_compiled(stream, planes_at, x_at, x_row, plan_at, tokens)
            if combine is not None and h is not None:
                h_at, h_slice = h.data_ptr(), h.stride(0) // known.h_grain
                combine.run_compiled(stream, h_at, h_slice, planes_at, plan_at, tokens)
                planes_at = h_at
            known.expand.run_compiled(stream, y_at, y_row, planes_at, plan_at, tokens)
            return
        known.shrink.run(planes, x, x_row, plan, tokens)
        if combine is not None and h is not None:
            combine.run(h, h.stride(0) // known.h_grain, planes, plan, tokens)
            planes = h.unsqueeze(0)
        known.expand.run(y, y_row, planes, plan, tokens)

    def _work_out(self, plan: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> _Launches:
        batch = Batch(self._ranks, plan, self._layout, self._facts, self._batch_invariant)
        kept = kept_type(y, self._lora_b)
        planes, shrink = shrink_launch(x, self._lora_a, batch, self._scale, kept)
        expand = expand_launch(
            y,
            planes,
            self._lora_b,
            batch,
            0,
            self._add_inputs,
            after_shrink=True,
            factors=self._factors,
        )
        combine = expand.before
        return _Launches(
            shrink=KeptLaunch(shrink, batch, _SHRINK),
            combine=None if combine is None else KeptLaunch(combine, batch, _COMBINE),
            expand=KeptLaunch(expand, batch, _EXPAND),
            parts=planes.size(0),
            plane_type=planes.dtype,
            kept=kept,
            h_grain=1 if combine is None else combine.constants["GRAIN"],
        )


@dataclass(frozen=True)
class _ShrinkLaunches:
    """As `_Launches`, of a first half whose result the caller wants."""

    shrink: KeptLaunch
    combine: KeptLaunch
    parts: int
    plane_type: torch.dtype
    h_grain: int


class PreparedShrinkLaunches:
    """`lora_shrink` for one layer; see `multilora_kernels.PreparedShrink`.

    Args:
        lora_a, ranks, layout, scale: as there, and valid.
        facts, batch_invariant: as of `PreparedLaunches`.
    """

    def __init__(
        self,
        lora_a: Sequence[torch.Tensor],
        ranks: torch.Tensor,
        layout: PlanLayout,
        scale: float,
        facts: DeviceFacts,
        *,
        batch_invariant: bool,
    ) -> None:
        self._lora_a, self._ranks, self._layout = tuple(lora_a), ranks, layout
        self._scale, self._facts, self._batch_invariant = scale, facts, batch_invariant
        self._known: dict[_Key, _ShrinkLaunches] = {}

    def run(self, plan: torch.Tensor, *, x: torch.Tensor, h: torch.Tensor) -> None:
        """Computes a batch into h; arguments are valid."""
        tokens = x.size(0)
        if not tokens:
            return
        x, own = aligned(x), aligned_h(h)
        key = power_of_two_up(tokens), x.dtype, h.dtype
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._work_out(plan, x, own)
        planes = torch.empty((known.parts, *own.shape), dtype=known.plane_type, device=own.device)
        x_row, h_slice = row_step(x), own.stride(0) // known.h_grain
        if known.combine.is_compiled:
            plan_at, planes_at, stream = plan.data_ptr(), planes.data_ptr(), current_stream()
            known.shrink.run_compiled(stream, planes_at, x.data_ptr(), x_row, plan_at, tokens)
            known.combine.run_compiled(stream, own.data_ptr(), h_slice, planes_at, plan_at, tokens)
        else:
            known.shrink.run(planes, x, x_row, plan, tokens)
            known.combine.run(own, h_slice, planes, plan, tokens)
        if own is not h:
            h.copy_(own)

    def _work_out(self, plan: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> _ShrinkLaunches:
        batch = Batch(self._ranks, plan, self._layout, self._facts, self._batch_invariant)
        planes, shrink = shrink_launch(x, self._lora_a, batch, self._scale, h.dtype)
        combine = prepare_combine(h, planes, batch)
        return _ShrinkLaunches(
            shrink=KeptLaunch(shrink, batch, _SHRINK),
            combine=KeptLaunch(combine, batch, _COMBINE),
            parts=planes.size(0),
            plane_type=planes.dtype,
            h_grain=combine.constants["GRAIN"],
        )


class PreparedExpandLaunches:
    """`lora_expand` for one layer; see `multilora_kernels.PreparedExpand`.

    Args:
        lora_b, ranks, layout, offset, add_inputs: as there, and valid.
        facts, batch_invariant: as of `PreparedLaunches`.
    """

    def __init__(
        self,
        lora_b: Sequence[torch.Tensor],
        ranks: torch.Tensor,
        layout: PlanLayout,
        offset: int,
        add_inputs: bool,
        facts: DeviceFacts,
        *,
        batch_invariant: bool,
    ) -> None:
        self._lora_b, self._ranks, self._layout = tuple(lora_b), ranks, layout
        self._add_inputs, self._facts = add_inputs, facts
        self._batch_invariant = batch_invariant
        self._offset = offset
        self._known: dict[_Key, KeptLaunch] = {}

    def run(self, plan: torch.Tensor, *, h: torch.Tensor, y: torch.Tensor) -> None:
        """Computes a batch in place on y; arguments are valid."""
        if not y.size(0):
            return
        with aligned_output(y, self._offset) as (own, first):
            self._run(plan, aligned_h(h), own, first)

    def _run(self, plan: torch.Tensor, h: torch.Tensor, y: torch.Tensor, first: int) -> None:
        tokens = y.size(0)
        key = power_of_two_up(tokens), h.dtype, y.dtype
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._work_out(plan, h, y, first)
        y_row = row_step(y)
        if known.is_compiled:
            addresses = y.data_ptr(), y_row, h.data_ptr(), plan.data_ptr()
            known.run_compiled(current_stream(), *addresses, tokens)
        else:
            known.run(y, y_row, h.unsqueeze(0), plan, tokens)

    def _work_out(
        self, plan: torch.Tensor, h: torch.Tensor, y: torch.Tensor, first: int
    ) -> KeptLaunch:
        batch = Batch(self._ranks, plan, self._layout, self._facts, self._batch_invariant)
        launch = expand_launch(
            y, h.unsqueeze(0), self._lora_b, batch, first, self._add_inputs, after_shrink=False
        )
        return KeptLaunch(launch, batch, _EXPAND)
