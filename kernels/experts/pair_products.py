"""Adapters of experts on GPUs: sorts a step's pairs there, and has the Triton kernels read them."""

# Constexpr parameters are upper-case, as is Triton's habit; Triton functions are not typed.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from multilora_kernels import plan as plans
from multilora_kernels.experts.pairs import MAX_PAIRS
from multilora_kernels.triton.activations import aligned, aligned_output
from multilora_kernels.triton.launch import Batch, Launch, device_facts
from multilora_kernels.triton.product import expand_launch, shrink_launch

_HEADER_INTS, _TILE_INTS = tl.constexpr(plans.HEADER_INTS), tl.constexpr(plans.TILE_INTS)
_TOKENS, _ROWS = tl.constexpr(plans.PLAN_TOKENS), tl.constexpr(plans.PLAN_ROWS)
_TILES, _PARTS = tl.constexpr(plans.PLAN_TILES), tl.constexpr(plans.PLAN_PARTS)
_LONGER, _TILE_ROWS = tl.constexpr(plans.PLAN_LONGER), tl.constexpr(plans.PART_ROWS)
_NO_ADAPTER = tl.constexpr(2**31 - 1)  # a slot behind all others


class PairProducts:
    """The adapters' products of one of a layer's projections.

    Each expert of each slot is a slot of its own for the kernels, so they read what the pairs of a
    step need, up to its true rank, and nothing else.

    Args:
        lora_a: By slice, [slots, experts, R, K], contiguous; kept, not copied.
        lora_b: By slice, [slots, experts, width, R]; columns or rows contiguous.
        batch_invariant: Whether results must not depend on the other pairs.

    Attributes:
        ranks: int32 [slices, slots, experts], the true ranks, on the device; none at first.
    """

    def __init__(
        self, lora_a: Sequence[torch.Tensor], lora_b: Sequence[torch.Tensor], batch_invariant: bool
    ) -> None:
        slots, self._experts = lora_a[0].shape[:2]
        self._a, self._b = ([each.flatten(0, 1) for each in ab] for ab in (lora_a, lora_b))
        self.ranks = lora_a[0].new_zeros(len(lora_a), slots, self._experts, dtype=torch.int32)
        # No tile is longer than the shortest block of a kernel: tiles may come in any order.
        most = min(slots * self._experts, MAX_PAIRS)
        self._layout = plans.PlanLayout(MAX_PAIRS, most, plans.PART_ROWS)
        # A kernel that starts early reads its plan before the one ahead, which may write it, ends.
        self._facts = replace(device_facts(self.ranks.device), pdl=False)
        self._invariant = batch_invariant

    def sort(
        self, experts: torch.Tensor, slots: torch.Tensor, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sorts a step's pairs, for all of a layer's projections.

        Args:
            experts: Integers [tokens, k].
            slots: int32 [at least tokens], contiguous: those of the tokens; -1 for none.
            places: Integers [all experts], contiguous: where they are among this worker's, -1 for
                others; None: it has all.

        Returns:
            The plans of parts of the step: int32 [parts, size of a plan].
        """
        top_k = experts.size(1)
        parts = experts.contiguous().split(MAX_PAIRS // top_k)
        size = triton.cdiv(self._layout.size, 4) * 4  # plans begin at multiples of 16 bytes
        found = experts.new_empty(len(parts), size, dtype=torch.int32)
        found[:, : plans.HEADER_INTS] = 0
        for number, (plan, part) in enumerate(zip(found, parts, strict=True)):
            first = number * (MAX_PAIRS // top_k)
            arguments = {"plan": plan, "experts": part, "slots": slots[first:], "places": places}
            arguments |= {"pairs": part.numel(), "order": self._layout.order.start}
            constants = {"EXPERTS": self._experts, "TOP_K": top_k, "BLOCK": 64}
            grid = (triton.cdiv(part.numel(), 64),)
            options = {"num_warps": 4, "num_stages": 1}
            Launch(sort_kernel, grid, arguments, constants, options).run()
        return found

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        pairs: torch.Tensor,
        top_k: int,
        weights: torch.Tensor | None = None,
        add_inputs: bool = True,
    ) -> None:
        """`y[pair] += weights[pair] * (x[pair] @ A.T) @ B.T`, by the pair's own A and B.

        Args:
            y: [tokens * k, width of all slices], rows contiguous.
            x: [tokens * k, K], or [tokens, K] where all experts of a token have the same.
            pairs: What `sort` made of the step.
            top_k: Experts of a token.
            weights: [tokens, k], the router's; None: 1.
            add_inputs: If False, overwrite.
        """
        sharers, at_a_time = len(y) // len(x), MAX_PAIRS // top_k * top_k
        ranks = self.ranks.flatten(1)
        rows = zip(y.split(at_a_time), x.split(at_a_time // sharers), strict=True)
        for number, (own_y, own_x) in enumerate(rows):
            batch = Batch(ranks, pairs[number], self._layout, self._facts, self._invariant)
            kept = None if weights is None else torch.float32
            h, shrink = shrink_launch(aligned(own_x), self._a, batch, 1.0, kept, sharers)
            shrink.run()
            if weights is not None:
                h *= weights.reshape(-1)[number * at_a_time :][: len(own_y), None]
            with aligned_output(own_y, 0) as (out, _):
                expand_launch(out, h, self._b, batch, 0, add_inputs, after_shrink=True).run()


@triton.jit(do_not_specialize=["pairs", "order"], do_not_specialize_on_alignment=["slots"])
def sort_kernel(
    plan,  # with a header of zeros
    experts,  # [pairs]
    slots,  # [pairs / TOP_K]
    places,  # [all experts], or None
    pairs,
    order,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a plan: each program compares its own pairs with all, for the pairs of one are few."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = _slots_of(own, experts, slots, places, pairs, EXPERTS, TOP_K)
    lower, same, same_before = own * 0, own * 0, own * 0
    for start in tl.range(0, pairs, BLOCK, num_stages=1):
        other = start + tl.arange(0, BLOCK)[None, :]
        others = _slots_of(other, experts, slots, places, pairs, EXPERTS, TOP_K)
        is_same = (other < pairs) & (others == slot[:, None])
        lower += tl.sum(((other < pairs) & (others < slot[:, None])).to(tl.int32), axis=1)
        same += tl.sum(is_same.to(tl.int32), axis=1)
        same_before += tl.sum((is_same & (other < own[:, None])).to(tl.int32), axis=1)
    place = lower + same_before
    tl.store(plan + order + place, own, mask=own < pairs)
    is_adapted = slot < _NO_ADAPTER
    begins = (is_adapted & (same_before % _TILE_ROWS == 0)).to(tl.int32)
    tiles = tl.sum(begins, axis=0)
    first = tl.atomic_add(plan + _TILES, tiles)  # a tile's product is its own, whichever is first
    for block in tl.static_range(_LONGER - _PARTS):
        tl.atomic_add(plan + _PARTS + block, tiles)
    tl.atomic_add(plan + _ROWS, tl.sum(is_adapted.to(tl.int32), axis=0))
    record = plan + _HEADER_INTS + (first + tl.cumsum(begins, axis=0) - begins) * _TILE_INTS
    tl.store(record, slot, mask=begins > 0)
    tl.store(record + 1, place, mask=begins > 0)
    tl.store(record + 2, tl.minimum(same - same_before, _TILE_ROWS), mask=begins > 0)
    tl.store(plan + _TOKENS, pairs)


@triton.jit
def _slots_of(pair, experts, slots, places, pairs, EXPERTS: tl.constexpr, TOP_K: tl.constexpr):
    """The kernels' slots of pairs."""
    expert = tl.load(experts + pair, mask=pair < pairs, other=0)
    if places is not None:
        expert = tl.load(places + expert)
    slot = tl.load(slots + pair // TOP_K, mask=pair < pairs, other=-1)
    is_adapted = (slot >= 0) & (expert >= 0)
    return tl.where(is_adapted, slot * EXPERTS + expert.to(tl.int32), _NO_ADAPTER)
