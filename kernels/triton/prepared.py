"""A layer's launches, worked out once for each range of token counts and repeated per batch.

Blocks, constants and options follow from the weights and from the number of tokens rounded up to
a power of two. A layer has the same weights in every step, so they are looked up; what a step
brings are tensors, the tokens and the number of programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from multilora_kernels.configs.model import power_of_two_up
from multilora_kernels.factors import OutputFactors
from multilora_kernels.plan import PlanLayout
from multilora_kernels.triton.kept_launch import (
    KeptLaunch,
    current_stream,
    is_aligned,
    is_short,
)
from multilora_kernels.triton.launch import Batch, DeviceFacts
from multilora_kernels.triton.product import expand_launch, shrink_launch
from multilora_kernels.triton.shrink import kept_type

_SHRINK = ("planes", "x", "x_row", "plan", "tokens")
_COMBINE = ("h", "h_slice", "planes", "plan", "tokens")
_EXPAND = ("y", "y_row", "planes", "plan", "tokens")


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
        """Whether an aligned batch needs nothing of Triton."""
        return (
            self.shrink.is_compiled
            and self.expand.is_compiled
            and (self.combine is None or self.combine.is_compiled)
        )


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
        *,
        batch_invariant: bool,
        factors: OutputFactors | None = None,
    ) -> None:
        self._lora_a, self._lora_b, self._ranks = tuple(lora_a), tuple(lora_b), ranks
        self._layout, self._scale, self._add_inputs = layout, scale, add_inputs
        self._facts, self._batch_invariant = facts, batch_invariant
        self._factors = factors
        self._max_rank = lora_a[0].size(-2)
        self._known: dict[tuple[int, torch.dtype, torch.dtype], _Launches] = {}

    def run(self, plan: torch.Tensor, *, x: torch.Tensor, y: torch.Tensor) -> None:
        """Computes a batch in place on y; arguments are valid."""
        tokens = x.size(0)
        if not tokens:
            return
        key = power_of_two_up(tokens), x.dtype, y.dtype
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._work_out(plan, x, y)
        shape = len(self._lora_a), tokens, self._max_rank
        planes = torch.empty(known.parts, *shape, dtype=known.plane_type, device=x.device)
        h = None
        if known.combine is not None:
            h = torch.empty(shape, dtype=known.kept, device=x.device)
        # One row begins where it begins, whatever lies behind it.
        x_row, y_row = (x.stride(0), y.stride(0)) if tokens > 1 else (x.size(1), y.size(1))
        at = plan.data_ptr(), x.data_ptr(), y.data_ptr(), planes.data_ptr()
        own = 0 if h is None else h.data_ptr()
        aligned = is_aligned(*at, own, x_row, y_row) and is_short(x_row, y_row)
        h_slice = 0 if h is None else h.stride(0) // known.h_grain
        if aligned and known.are_compiled:
            plan_at, x_at, y_at, planes_at = at
            stream = current_stream()
            known.shrink.run_compiled(stream, planes_at, x_at, x_row, plan_at, tokens)
            if known.combine is not None:
                known.combine.run_compiled(stream, own, h_slice, planes_at, plan_at, tokens)
                planes_at = own
            known.expand.run_compiled(stream, y_at, y_row, planes_at, plan_at, tokens)
            return
        known.shrink.run(planes, x, x_row, plan, tokens, aligned=aligned)
        if known.combine is not None and h is not None:
            known.combine.run(h, h_slice, planes, plan, tokens, aligned=aligned)
            planes = h.unsqueeze(0)
        known.expand.run(y, y_row, planes, plan, tokens, aligned=aligned)

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
