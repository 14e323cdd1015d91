"""The specification of adapters of experts, in loops that anybody can check.

Notation: T rows, k experts of each, E experts, S slots, R the slots' rank, K the model's width and
I the experts' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def experts_with_adapters(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    token_slots: Sequence[int],
    w13_adapters: Sequence[tuple[torch.Tensor, torch.Tensor]],
    w2_adapter: tuple[torch.Tensor, torch.Tensor],
    w13_ranks: torch.Tensor,
    w2_ranks: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`sum over j of weights[t, j] * expert(experts[t, j], x[t])`, with each row's own adapter.

    An expert e of a row with the adapter in slot s computes, with A and B up to their true ranks::

        gate_up = w13[e] @ x + B13[s, e] @ A13[s, e] @ x
        h       = activation(gate_up)
        y       = w2[e] @ h + B2[s, e] @ A2[s, e] @ h

    Args:
        x: [T, K].
        w13: [E, 2 I, K], in the activation's order.
        w2: [E, K, I].
        experts: Integers [T, k].
        weights: [T, k], the router's.
        token_slots: The slot of each row; -1 for a row without adapter.
        w13_adapters: A [S, E, R, K] and B [S, E, width, R] of slices of w13 that follow each other.
        w2_adapter: A [S, E, R, I] and B [S, E, K, R].
        w13_ranks: int32 [slices, S, E], true ranks.
        w2_ranks: int32 [1, S, E].
        activation: From gates and what they multiply, [2 I], to [I].

    Returns:
        [T, K], in the dtype of x.
    """
    out = torch.zeros_like(x)
    for t, slot in enumerate(token_slots):
        for expert, weight in zip(experts[t].tolist(), weights[t], strict=True):
            gate_up = w13[expert].to(x.dtype) @ x[t]
            if slot >= 0:
                parts = zip(w13_adapters, w13_ranks, strict=True)
                deltas = [_delta(x[t], *ab, int(r[slot, expert]), slot, expert) for ab, r in parts]
                gate_up = gate_up + torch.cat(deltas)
            h = activation(gate_up)
            y = w2[expert].to(x.dtype) @ h
            if slot >= 0:
                y = y + _delta(h, *w2_adapter, int(w2_ranks[0, slot, expert]), slot, expert)
            out[t] += weight.to(x.dtype) * y
    return out


def _delta(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rank: int, slot: int, expert: int
) -> torch.Tensor:
    a, b = a[slot, expert, :rank].to(x.dtype), b[slot, expert, :, :rank].to(x.dtype)
    return b @ (a @ x)
