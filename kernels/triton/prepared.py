"""A layer's launches, worked out once for each range of token counts and repeated per batch.

Blocks, constants and options follow from the weights and from the number of tokens rounded up to
a power of two. A layer has the same weights in every step, so they are looked up; what a step
brings are tensors, the tokens and the number of programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from multilora_kernels.configs.model import power_of_two_up
from multilora_kernels.factors import OutputFactors
from multilora_kernels.plan import PlanLayout
from multilora_kernels.triton.launch import Batch, DeviceFacts, Launch
from multilora_kernels.triton.product import expand_launch, shrink_launch
from multilora_kernels.triton.shrink import kept_type

# Arguments that are another tensor, or another number, in every batch.
_OF_A_BATCH = {"plan", "tokens", "planes", "h", "h_slice", "x", "x_row", "y", "y_row"}


@dataclass(frozen=True)
class _Launches:
    """What all batches of a range of token counts share.

    Attributes:
        batch: For the number of programs; its plan is not used.
        shrink, combine, expand: Without the tensors of a batch, which would be kept alive.
        parts: Parts of K.
        plane_type, kept: The types of the planes and, if they are added up, of their sum.
    """

    batch: Batch
    shrink: Launch
    combine: Launch | None
    expand: Launch
    parts: int
    plane_type: torch.dtype
    kept: torch.dtype


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
        shared = {"plan": plan, "tokens": tokens}
        shrink = {"planes": planes, "x": x, "x_row": x.stride(0), **shared}
        first = _repeat(known.shrink, known.batch, shrink)
        before = None
        if known.combine is not None:
            h = torch.empty(shape, dtype=known.kept, device=x.device)
            own = {"h": h, "h_slice": h.stride(0) // known.combine.constants["GRAIN"]}
            before = _repeat(known.combine, known.batch, {**own, "planes": planes, **shared})
            planes = h.unsqueeze(0)
        expand = {"y": y, "y_row": y.stride(0), "planes": planes, **shared}
        last = _repeat(known.expand, known.batch, expand, before)
        # All memory is there by now: nothing comes between the launches.
        first.run()
        last.run()

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
            batch=batch,
            shrink=_without_batch(shrink),
            combine=combine and _without_batch(combine),
            expand=_without_batch(expand),
            parts=planes.size(0),
            plane_type=planes.dtype,
            kept=kept,
        )


def _without_batch(launch: Launch) -> Launch:
    # Places of a batch's own arguments are kept, so that all launches name them in one order.
    kept = {name: None if name in _OF_A_BATCH else a for name, a in launch.arguments.items()}
    return replace(launch, arguments=kept, before=None)


def _repeat(
    launch: Launch, batch: Batch, of_the_batch: dict[str, Any], before: Launch | None = None
) -> Launch:
    grid = (
        (batch.programs(launch.spread, of_the_batch["tokens"]),) if launch.spread else launch.grid
    )
    return replace(launch, grid=grid, arguments={**launch.arguments, **of_the_batch}, before=before)
