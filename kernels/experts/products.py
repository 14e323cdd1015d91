"""A mixture's layer for rows with adapters of its experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from multilora_kernels.experts.packed import PackedExperts, sum_of_experts
from multilora_kernels.experts.pairs import MAX_PAIRS, Ints, PairSorter
from multilora_kernels.native.segment_gemm import LINEAR, Call

Activation = Callable[[torch.Tensor], torch.Tensor]
Ranks = int | Sequence[int]


def _gated(function: Callable[[torch.Tensor], torch.Tensor]) -> Activation:
    def activation(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return function(gate) * up

    return activation


def _swigluoai(gate_up: torch.Tensor) -> torch.Tensor:
    """GPT-OSS's: gates and what they multiply take turns, and both are bounded."""
    gate, up = gate_up[..., ::2].clamp(max=7), gate_up[..., 1::2].clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": _gated(F.silu),
    "gelu": _gated(F.gelu),
    "gelu_tanh": _gated(partial(F.gelu, approximate="tanh")),
    "swigluoai": _swigluoai,
}
"""Activations of gates and what they multiply, [..., 2 I], by vLLM's names for them."""


@dataclass(frozen=True)
class ExpertAdapters:
    """The slots of a layer's experts.

    Shapes: S slots, E experts, R maximum rank, K the model's width, I the experts' own.

    Attributes:
        w13_a: For gates and for what they multiply, or once for both: [S, E, R, K].
        w13_b: Likewise: [S, E, width, R], of widths that add up to 2 I; columns or rows contiguous.
        w2_a: [S, E, R, I].
        w2_b: [S, E, K, R].
    """

    w13_a: Sequence[torch.Tensor]
    w13_b: Sequence[torch.Tensor]
    w2_a: torch.Tensor
    w2_b: torch.Tensor


class ExpertProducts:
    """Computes a layer's rows that have adapters; not for two threads at once.

    Args:
        w13: [E, 2 I, K], in the activation's order; where that is gates first, packing may have
            padded each half.
        w2: [E, K, I], padded likewise.
        adapters: The slots.
        activation: See `ACTIVATIONS`.

    Raises:
        ValueError: The weights' sizes do not fit the slots'.
    """

    def __init__(
        self,
        w13: PackedExperts,
        w2: PackedExperts,
        adapters: ExpertAdapters,
        activation: Activation,
    ) -> None:
        slots, experts = adapters.w2_a.shape[:2]
        self._inner, padded = adapters.w2_a.size(-1), w2.inputs
        widths = [b.size(-2) for b in adapters.w13_b]
        padding = padded - self._inner
        if (
            w13.outputs != 2 * padded
            or sum(widths) != 2 * self._inner
            or padding < 0
            or not w13.experts == w2.experts == experts
        ):
            raise ValueError(
                f"expected weights of {experts} experts of width {self._inner} or padded, as the "
                f"slots have, found {w13.experts} with {w13.outputs} outputs and {w2.experts} with "
                f"{w2.inputs} inputs"
            )
        self._w13, self._w2, self._activation = w13, w2, activation
        self._sorter = PairSorter(slots, experts)
        a, b, self._slices = _around_padding(adapters, self._inner, padding)
        self._w13_ranks = torch.zeros(len(a), slots, experts, dtype=torch.int32)
        self._w2_ranks = torch.zeros(1, slots, experts, dtype=torch.int32)
        self._w13_adapters = self._call(a, b, self._w13_ranks)
        self._w2_adapters = self._call([adapters.w2_a], [adapters.w2_b], self._w2_ranks)

    def set_ranks(self, slot: int, w13: Sequence[Ranks], w2: Ranks) -> None:
        """Says which ranks of a slot count; the weights past them may hold anything.

        Args:
            slot: The slot.
            w13: Of each slice of w13, one rank for all experts or one for each.
            w2: Likewise.
        """
        for own, ranks in zip(self._slices, w13, strict=True):
            self._w13_ranks[own, slot] = torch.as_tensor(ranks, dtype=torch.int32)
        self._w2_ranks[0, slot] = torch.as_tensor(w2, dtype=torch.int32)

    def _call(
        self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], ranks: torch.Tensor
    ) -> Call:
        """The adapters' product, for which each expert of each slot is a slot."""
        flat = [each.view(-1, *each.shape[2:]) for each in (*a, *b)]  # never copies
        slices = len(a)
        return Call(
            LINEAR, flat[:slices], flat[slices:], ranks.view(len(a), -1), self._sorter.layout
        )

    def __call__(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        rows: npt.NDArray[np.int32],
        slots: Ints,
    ) -> None:
        """Overwrites some rows of `out` by what their experts make of x.

        Args:
            out: [all rows, K].
            x: [all rows, K].
            experts: Integers [all rows, k].
            weights: [all rows, k], the router's.
            rows: [rows]: which ones.
            slots: [rows]: the slots of their adapters.

        Raises:
            ValueError: An expert or a slot is out of bounds.
        """
        at_a_time = max(1, MAX_PAIRS // experts.size(1))
        for first in range(0, len(rows), at_a_time):
            part = slice(first, first + at_a_time)
            self._compute(out, x, experts, weights, rows[part], slots[part])

    def _compute(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        rows: npt.NDArray[np.int32],
        slots: Ints,
    ) -> None:
        pairs = self._sorter.sort(experts.numpy()[rows], slots)
        x = x.index_select(0, torch.from_numpy(rows[pairs.tokens]))
        gate_up = x.new_empty(len(x), self._w13.outputs, dtype=torch.float32)
        self._w13.multiply(gate_up, x, pairs.segments)
        self._add_adapters(self._w13_adapters, pairs.plan, x, gate_up)
        h = self._activation(gate_up).to(x.dtype)
        y = x.new_empty(len(x), self._w2.outputs, dtype=torch.float32)
        self._w2.multiply(y, h, pairs.segments)
        self._add_adapters(self._w2_adapters, pairs.plan, h[:, : self._inner], y)
        factors = weights.index_select(0, torch.from_numpy(rows)).float()
        sum_of_experts(out, y, pairs.places, factors, rows)

    @staticmethod
    def _add_adapters(call: Call, plan: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        if not call.run_again(y, x, plan):
            call(plan, x=x, y=y)


def _around_padding(
    adapters: ExpertAdapters, inner: int, padding: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[list[int]]]:
    """The slices of w13: where packing has padded the gates, with others of rank 0 after these.

    Returns:
        A and B of each, and which of them the adapters' own slices are.
    """
    a, b = list(adapters.w13_a), list(adapters.w13_b)
    if not padding:
        return a, b, [[i] for i in range(len(a))]
    is_one = len(a) == 1
    gate, up = b[0][..., :inner, :], b[-1][..., -inner:, :]
    widths = [min(inner, padding - start) for start in range(0, padding, inner)]
    last = 1 + len(widths)
    b = [gate, *(gate[..., :width, :] for width in widths), up]
    return [a[0]] * last + [a[-1]], b, [[0, last]] if is_one else [[0], [last]]
