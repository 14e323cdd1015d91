"""Sorts a step's pairs of an expert and an adapter, once for all products of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.plan import HEADER_INTS, PLAN_TILES, TILE_INTS, PlanLayout

MAX_PAIRS = 8192
"""Pairs that are computed at a time, which bounds the memory for what is between the products."""

_MAX_SLOTS = 2**15 - 2  # of a plan's layout, which takes their number for its own length alone

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Pairs:
    """Pairs in the order in which they are computed: by expert, then by slot, then by token.

    Attributes:
        tokens: Integers [pairs]: whose pairs they are.
        segments: int32 [segments, 3]: expert, first pair and number of pairs.
        plan: int32: what `segment_gemm` reads, for slots numbered `slot * experts + expert`.
        places: int32 [tokens, k]: where each token's pairs are.
    """

    tokens: Ints
    segments: npt.NDArray[np.int32]
    plan: torch.Tensor
    places: npt.NDArray[np.int32]


class PairSorter:
    """Sorts pairs of a layer with so many slots and experts.

    Args:
        slots: Adapter slots.
        experts: Experts of the layer.

    Attributes:
        layout: Of the plans.
    """

    def __init__(self, slots: int, experts: int) -> None:
        self._slots, self._experts = slots, experts
        self.layout = PlanLayout(MAX_PAIRS, min(slots * experts, _MAX_SLOTS))

    def sort(self, experts: Ints, token_slots: Ints) -> Pairs:
        """Sorts pairs.

        Args:
            experts: [tokens, k], at most `MAX_PAIRS` in all.
            token_slots: [tokens], each a slot.

        Raises:
            ValueError: An expert or a slot is out of bounds.
        """
        tokens, top_k = experts.shape
        keys = (experts.astype(np.int64) * self._slots + token_slots[:, None]).ravel()
        _check(experts, self._experts, "experts")
        _check(token_slots, self._slots, "token_slots")
        order = keys.argsort(kind="stable")
        keys = keys[order]
        of_pair = keys // self._slots
        starts, lengths = _runs(of_pair)
        segments = np.stack([of_pair[starts], starts, lengths], axis=1).astype(np.int32)
        places = np.empty(len(order), dtype=np.int32)
        places[order] = np.arange(len(order), dtype=np.int32)
        plan = self._plan(keys)
        return Pairs(order // top_k, segments, plan, places.reshape(tokens, top_k))

    def _plan(self, keys: Ints) -> torch.Tensor:
        """A plan for rows that are sorted already."""
        starts, lengths = _runs(keys)
        size = self.layout.tile_rows
        if len(lengths) and lengths.max() > size:
            per_run = -(-lengths // size)
            ends = per_run.cumsum()
            within = np.arange(ends[-1]) - (ends - per_run).repeat(per_run)
            lengths = np.minimum(lengths.repeat(per_run) - within * size, size)
            starts = starts.repeat(per_run) + within * size
        ints = np.zeros(self.layout.size, dtype=np.int32)
        of_tiles = keys[starts]
        slots = of_tiles % self._slots * self._experts + of_tiles // self._slots
        records = ints[HEADER_INTS : self.layout.order.start].reshape(-1, TILE_INTS)
        records[: len(starts), :3] = np.stack([slots, starts, lengths], axis=1)
        ints[self.layout.order][: len(keys)] = np.arange(len(keys))
        ints[: PLAN_TILES + 1] = len(keys), len(keys), len(starts), len(starts)
        return torch.from_numpy(ints)


def _runs(keys: Ints) -> tuple[Ints, Ints]:
    """Where equal keys begin, and how many follow each other; the keys are sorted."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    return starts, np.diff(starts, append=len(keys))


def _check(found: Ints, most: int, name: str) -> None:
    if found.size and not (found.min() >= 0 and found.max() < most):
        raise ValueError(
            f"{name} must be between 0 and {most - 1}, found {found.min()} to {found.max()}"
        )
