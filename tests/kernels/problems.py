"""Random LoRA problems: a batch, weights whose unused parts are poisoned, activations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from multilora_kernels import BatchPlan, reference


@dataclass
class Problem:
    """Everything one call of `lora_linear` needs."""

    token_slots: list[int]
    x: torch.Tensor
    y: torch.Tensor
    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    ranks: torch.Tensor
    plan: BatchPlan

    def expected(self, **options) -> torch.Tensor:
        """The reference's result in float64 for `lora_linear(y, ...)`."""
        y = self.y.double()
        reference.lora_linear(
            y, self.x.double(), self.lora_a, self.lora_b, self.ranks, self.token_slots, **options
        )
        return y

    def magnitude(self, **options) -> torch.Tensor:
        """`expected` over absolute values: the size of what is summed up for each output."""
        options["scale"] = abs(options.get("scale", 1.0))
        return replace(
            self,
            x=self.x.abs(),
            y=self.y.abs(),
            lora_a=[a.abs() for a in self.lora_a],
            lora_b=[b.abs() for b in self.lora_b],
        ).expected(**options)


def make_problem(
    token_slots: list[int],
    *,
    slots: int = 8,
    k: int = 40,
    widths: tuple[int, ...] = (24,),
    max_rank: int = 16,
    ranks: list[list[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    extra_dimension: bool = True,
    margin: int = 3,
    tile_rows: int = 32,
    seed: int = 0,
) -> Problem:
    """A seeded problem; weights past a slot's rank are NaN, so that reading them shows.

    Tiles are shorter than an engine's, so that small problems have several for an adapter.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(to)

    if ranks is None:
        ranks = np.random.default_rng(seed).integers(0, max_rank + 1, (len(widths), slots)).tolist()
    weight_dtype = weight_dtype or dtype
    one = (1,) if extra_dimension else ()
    lora_a, lora_b = [], []
    for width, slice_ranks in zip(widths, ranks, strict=True):
        a = random(slots, *one, max_rank, k, to=weight_dtype)
        b = random(slots, *one, width, max_rank, to=weight_dtype)
        for slot, rank in enumerate(slice_ranks):
            a[slot, ..., rank:, :] = float("nan")
            b[slot, ..., rank:] = float("nan")
        lora_a.append(a)
        lora_b.append(b)
    tokens = len(token_slots)
    return Problem(
        token_slots=token_slots,
        x=random(tokens, k),
        y=random(tokens, sum(widths) + margin),
        lora_a=lora_a,
        lora_b=lora_b,
        ranks=torch.tensor(ranks, dtype=torch.int32),
        plan=BatchPlan.build(np.array(token_slots, dtype=np.int64), slots, tile_rows=tile_rows),
    )
