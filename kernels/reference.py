"""The specification of the kernels: what they compute, in loops anybody can check.

Every backend is tested against these functions in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multilora_kernels.factors import OutputFactors


def lora_shrink(
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    token_slots: Sequence[int],
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """`h[i, t, :r] = scale * x[t] @ lora_a[i][s, :r].T`, with s = token_slots[t], r = ranks[i, s].

    Returns:
        h of shape [slices, tokens, R] in the dtype of x, zeros past r and where s is -1.
    """
    h = x.new_zeros(len(lora_a), len(token_slots), lora_a[0].shape[-2])
    for i, weights in enumerate(lora_a):
        for t, slot in enumerate(token_slots):
            if slot >= 0:
                r = int(ranks[i, slot])
                a = weights.flatten(0, -3)[slot, :r].to(x.dtype)
                h[i, t, :r] = scale * (a @ x[t])
    return h


def lora_expand(
    y: torch.Tensor,
    h: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    token_slots: Sequence[int],
    *,
    offset: int = 0,
    add_inputs: bool = True,
) -> None:
    """`y[t, off : off + N_i] += h[i, t, :r] @ lora_b[i][s, :, :r].T`, in place.

    off is `offset` plus the widths of the slices before i. With `add_inputs=False` the span
    is overwritten, by zeros where there is nothing to add.
    """
    for i, weights in enumerate(lora_b):
        span = slice(offset, offset + weights.shape[-2])
        for t, slot in enumerate(token_slots):
            r = int(ranks[i, slot]) if slot >= 0 else 0
            delta = weights.flatten(0, -3)[slot, :, :r].to(y.dtype) @ h[i, t, :r].to(y.dtype)
            y[t, span] = y[t, span] + delta if add_inputs else delta
        offset = span.stop


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    token_slots: Sequence[int],
    *,
    scale: float = 1.0,
    offset: int = 0,
    add_inputs: bool = True,
    factors: OutputFactors | None = None,
) -> None:
    """`lora_shrink`, `lora_expand`, `apply_factors`, in place on y of shape [tokens, width]."""
    h = lora_shrink(x, lora_a, ranks, token_slots, scale=scale)
    lora_expand(y, h, lora_b, ranks, token_slots, offset=offset, add_inputs=add_inputs)
    if factors is not None:
        widths = [b.shape[-2] for b in lora_b]
        apply_factors(y, factors, widths, ranks, token_slots, offset=offset)


def apply_factors(
    y: torch.Tensor,
    factors: OutputFactors,
    widths: Sequence[int],
    ranks: torch.Tensor,
    token_slots: Sequence[int],
    *,
    offset: int = 0,
) -> None:
    """`y[t, n] += values[s, n] * (y[t, n] - bias[n])` where the slice is marked, in place."""
    first = 0
    for i, width in enumerate(widths):
        own, span = slice(first, first + width), slice(offset + first, offset + first + width)
        bias = 0 if factors.bias is None else factors.bias[own].to(y.dtype)
        for t, slot in enumerate(token_slots):
            if slot >= 0 and ranks[i, slot] and factors.marks[i, slot]:
                y[t, span] += factors.values[slot, own].to(y.dtype) * (y[t, span] - bias)
        first += width
