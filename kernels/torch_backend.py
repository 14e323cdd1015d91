"""The plain PyTorch backend: one product per run and slice, on any device.

Slower than the native kernels where many adapters have few tokens each, but it needs nothing
beyond PyTorch. It reads the plan on the host, which on an accelerator waits for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch

from multilora_kernels.factors import OutputFactors
from multilora_kernels.plan import PLAN_ROWS, PLAN_TILES, PLAN_TOKENS, PlanLayout


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    scale: float,
    offset: int,
    add_inputs: bool,
    factors: OutputFactors | None = None,
) -> None:
    """See `multilora_kernels.lora_linear`; arguments are valid."""
    h = torch.empty(
        len(lora_a), x.size(0), lora_a[0].size(-2), dtype=torch.float32, device=x.device
    )
    lora_shrink(h, x, lora_a, ranks, plan, layout, scale)
    lora_expand(y, h, lora_b, ranks, plan, layout, offset, add_inputs, factors)


def lora_shrink(
    h: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    scale: float,
) -> None:
    """See `multilora_kernels.lora_shrink`; arguments are valid."""
    h[:, : int(plan[PLAN_TOKENS])] = 0
    host_ranks = ranks.tolist()
    for slot, rows in _runs(plan, layout, x.size(0)):
        own = x[rows].float()
        for i, a in enumerate(lora_a):
            if r := host_ranks[i][slot]:
                weights = a.flatten(0, -3)[slot, :r].float()
                h[i, rows, :r] = (own @ weights.T * scale).to(h.dtype)


def lora_expand(
    y: torch.Tensor,
    h: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    offset: int,
    add_inputs: bool,
    factors: OutputFactors | None = None,
) -> None:
    """See `multilora_kernels.lora_expand`; arguments are valid."""
    if not add_inputs:
        width = sum(b.size(-2) for b in lora_b)
        y[: int(plan[PLAN_TOKENS]), offset : offset + width] = 0
    host_ranks = ranks.tolist()
    marks = None if factors is None else factors.marks.tolist()
    for slot, rows in _runs(plan, layout, y.size(0)):
        start = offset
        for i, b in enumerate(lora_b):
            if r := host_ranks[i][slot]:
                weights = b.flatten(0, -3)[slot, :, :r].float()
                span = slice(start, start + b.size(-2))
                delta = h[i, rows, :r].float() @ weights.T
                total = y[rows, span].float() + delta
                if factors is not None and marks is not None and marks[i][slot]:
                    own = slice(start - offset, start - offset + b.size(-2))
                    bias = 0 if factors.bias is None else factors.bias[own]
                    total += factors.values[slot, own] * (total - bias)
                y[rows, span] = total.to(y.dtype)
            start += b.size(-2)


def prepare_linear(
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
    scale: float,
    add_inputs: bool,
    factors: OutputFactors | None = None,
) -> Callable[..., None]:
    """What runs a batch of `multilora_kernels.PreparedLinear`; arguments are valid."""
    kept = tuple(lora_a), tuple(lora_b), ranks

    def run(plan: torch.Tensor, *, x: torch.Tensor, y: torch.Tensor) -> None:
        lora_linear(y, x, *kept, plan, layout, scale, 0, add_inputs, factors)

    return run


def prepare_shrink(
    lora_a: Sequence[torch.Tensor], ranks: torch.Tensor, layout: PlanLayout, scale: float
) -> Callable[..., None]:
    """The same of `multilora_kernels.PreparedShrink`."""
    kept = tuple(lora_a), ranks

    def run(plan: torch.Tensor, *, x: torch.Tensor, h: torch.Tensor) -> None:
        lora_shrink(h, x, *kept, plan, layout, scale)

    return run


def prepare_expand(
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
    offset: int,
    add_inputs: bool,
) -> Callable[..., None]:
    """The same of `multilora_kernels.PreparedExpand`."""
    kept = tuple(lora_b), ranks

    def run(plan: torch.Tensor, *, h: torch.Tensor, y: torch.Tensor) -> None:
        lora_expand(y, h, *kept, plan, layout, offset, add_inputs)

    return run


def _runs(
    plan: torch.Tensor, layout: PlanLayout, tokens: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each active slot and the tokens it covers, those at or past `tokens` left out."""
    count = int(plan[PLAN_TILES])
    order = plan[layout.order][: int(plan[PLAN_ROWS])].long()
    slots, lengths = plan[layout.tile_slot][:count], plan[layout.tile_length][:count]
    tiles: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    for slot, rows in zip(slots.tolist(), order.split(lengths.tolist()), strict=True):
        tiles[slot].append(rows)
    for slot, parts in tiles.items():
        rows = torch.cat(parts)
        yield slot, rows[rows < tokens]
