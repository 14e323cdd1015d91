"""Random mixtures of experts with adapters, whose unused parts are poisoned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from multilora_kernels.experts import (
    ACTIVATIONS,
    ExpertAdapters,
    ExpertProducts,
    PackedExperts,
)
from multilora_kernels.experts.packed import BLOCK

from .expert_reference import experts_with_adapters


@dataclass
class ExpertProblem:
    """A layer, its slots and a batch; `word` is how its weights are packed."""

    x: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    token_slots: list[int]
    adapters: ExpertAdapters
    w13_ranks: torch.Tensor
    w2_ranks: torch.Tensor
    word: int = 1
    activation: str = "silu"

    def expected(self) -> torch.Tensor:
        """The reference's result in float64, rows without adapters included."""
        return experts_with_adapters(
            self.x.double(),
            self.w13.double(),
            self.w2.double(),
            self.experts,
            self.weights,
            self.token_slots,
            list(zip(self.adapters.w13_a, self.adapters.w13_b, strict=True)),
            (self.adapters.w2_a, self.adapters.w2_b),
            self.w13_ranks,
            self.w2_ranks,
            ACTIVATIONS[self.activation],
        )

    def products(self) -> ExpertProducts:
        """The layer with these ranks in its slots."""
        inner = self.w2.size(-1)
        padded = -(-inner // 32) * 32
        gate, up = self.w13.chunk(2, dim=1)
        w13 = torch.cat([_padded(gate, padded, 1), _padded(up, padded, 1)], dim=1)
        products = ExpertProducts(
            packed(w13, self.word),
            packed(_padded(self.w2, padded, 2), self.word),
            self.adapters,
            ACTIVATIONS[self.activation],
        )
        for slot in range(self.w2_ranks.size(1)):
            w13_ranks = self.w13_ranks[:, slot].tolist()
            products.set_ranks(slot, w13_ranks, self.w2_ranks[0, slot].tolist())
        return products

    def found(self) -> torch.Tensor:
        """What the kernels make of the rows with adapters; the others' rows are as expected."""
        out = self.expected().to(self.x.dtype)
        slots = np.array(self.token_slots)
        rows = np.flatnonzero(slots >= 0).astype(np.int32)
        out[torch.from_numpy(rows)] = float("nan")
        self.products()(out, self.x, self.experts, self.weights, rows, slots[rows])
        return out

    def of_rows(self, rows: list[int]) -> ExpertProblem:
        """The same with some rows only."""
        return replace(
            self,
            x=self.x[rows],
            experts=self.experts[rows],
            weights=self.weights[rows],
            token_slots=[self.token_slots[row] for row in rows],
        )


def packed(weights: torch.Tensor, word: int) -> PackedExperts:
    """Weights [experts, outputs, inputs] as vLLM packs them."""
    experts, outputs, inputs = weights.shape
    blocks = weights.view(experts, outputs // BLOCK, BLOCK, inputs // word, word)
    return PackedExperts(blocks.transpose(2, 3).reshape(weights.shape).contiguous(), word)


def _padded(weights: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    padding = [0, 0] * weights.dim()
    padding[2 * (weights.dim() - 1 - dim) + 1] = size - weights.size(dim)
    return F.pad(weights, padding)


def make_experts(
    token_slots: list[int],
    *,
    experts: int = 6,
    top_k: int = 2,
    slots: int = 4,
    k: int = 64,
    inner: int = 48,
    max_rank: int = 8,
    fused: bool = False,
    dtype: torch.dtype = torch.float32,
    word: int = 1,
    by_column: bool = True,
    seed: int = 0,
) -> ExpertProblem:
    """A seeded problem; weights past a rank are NaN, so that reading them shows.

    Args:
        token_slots: The slot of each row; -1 for none.
        experts: Of the layer.
        top_k: Experts of each row.
        slots: Adapter slots.
        k: The model's width.
        inner: The experts' own.
        max_rank: Of the slots; true ranks differ by slot, slice and expert.
        fused: Whether adapters have gates and what they multiply as one slice.
        dtype: Of everything.
        word: Inputs of a word of packed weights.
        by_column: How the slots' B are stored.
        seed: Of all numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def ranked(a: torch.Tensor, b: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
        for place in np.ndindex(*ranks.shape):
            a[(*place, slice(int(ranks[place]), None))] = float("nan")
            b[(*place, slice(None), slice(int(ranks[place]), None))] = float("nan")
        return b.mT.contiguous().mT if by_column else b

    widths = (2 * inner,) if fused else (inner, inner)
    shape = (len(widths) + 1, slots, experts)
    ranks = torch.randint(0, max_rank + 1, shape, generator=generator, dtype=torch.int32)
    w13_a = [random(slots, experts, max_rank, k, scale=k**-0.5) for _ in widths]
    w13_b = [random(slots, experts, width, max_rank, scale=0.3) for width in widths]
    w13_b = [ranked(*each) for each in zip(w13_a, w13_b, ranks, strict=False)]
    w2_a = random(slots, experts, max_rank, inner, scale=inner**-0.5)
    w2_b = ranked(w2_a, random(slots, experts, k, max_rank, scale=0.3), ranks[-1])
    rows = len(token_slots)
    chosen = torch.stack(
        [torch.randperm(experts, generator=generator)[:top_k] for _ in range(rows)]
    )
    return ExpertProblem(
        x=random(rows, k),
        w13=random(experts, 2 * inner, k, scale=k**-0.5),
        w2=random(experts, k, inner, scale=inner**-0.5),
        experts=chosen.int(),
        weights=torch.rand(rows, top_k, generator=generator),
        token_slots=token_slots,
        adapters=ExpertAdapters(w13_a, w13_b, w2_a, w2_b),
        w13_ranks=ranks[:-1],
        w2_ranks=ranks[-1:],
        word=word,
    )
