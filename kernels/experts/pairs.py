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
        plan: int32: what `segment_gemm` reads, for slots numbered `slot * experts + expert`; the
            sorter's own, which its next pairs overwrite.
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
        self._numbers = np.arange(MAX_PAIRS, dtype=np.int32)
        ints = np.zeros(self.layout.size, dtype=np.int32)
        ints[self.layout.order] = self._numbers  # pairs are in their order
        self._ints, self._plan = ints, torch.from_numpy(ints)

    def sort(self, experts: Ints, token_slots: Ints) -> Pairs:
        """Sorts pairs.

        Args:
            experts: [tokens, k], at most `MAX_PAIRS` in all.
            token_slots: [tokens], each a slot.

        Raises:
            ValueError: An expert or a slot is out of bounds.
        """
        tokens, top_k = experts.shape
        _check(experts, self._experts, "experts")
        _check(token_slots, self._slots, "token_slots")
        keys = (experts * np.int64(self._slots) + token_slots[:, None]).ravel()
        order = keys.argsort(kind="stable")
        keys = keys[order]
        of_pair = keys // self._slots
        segments = _runs(of_pair)
        segments[:, 0] = of_pair[segments[:, 1]]
        places = np.empty(len(order), dtype=np.int32)
        places[order] = self._numbers[: len(order)]
        self._write_plan(keys)
        return Pairs(order // top_k, segments, self._plan, places.reshape(tokens, top_k))

    def _write_plan(self, keys: Ints) -> None:
        """Writes the plan for rows that are sorted already."""
        tiles, size = _runs(keys), self.layout.tile_rows
        lengths = tiles[:, 2]
        if len(lengths) and lengths.max() > size:
            per_run = -(-lengths // size)
            ends = per_run.cumsum()
            within = np.arange(ends[-1]) - (ends - per_run).repeat(per_run)
            tiles = tiles.repeat(per_run, axis=0)
            tiles[:, 1] += within * size
            tiles[:, 2] = np.minimum(tiles[:, 2] - within * size, size)
        expert, slot = np.divmod(keys[tiles[:, 1]], self._slots)
        tiles[:, 0] = slot * self._experts + expert
        records = self._ints[HEADER_INTS : self.layout.order.start].reshape(-1, TILE_INTS)
        records[: len(tiles), :3] = tiles
        self._ints[: PLAN_TILES + 1] = len(keys), len(keys), len(tiles), len(tiles)


def _runs(keys: Ints) -> npt.NDArray[np.int32]:
    """Runs of equal sorted keys: [runs, 3], columns for the caller, for starts and for lengths."""
    ends = np.flatnonzero(keys[1:] != keys[:-1])
    runs = np.empty((len(ends) + 1 if len(keys) else 0, 3), dtype=np.int32)
    runs[:1, 1] = 0
    runs[1:, 1] = ends + 1
    runs[:-1, 2] = runs[1:, 1]
    runs[-1:, 2] = len(keys)
    runs[:, 2] -= runs[:, 1]
    return runs


def _check(found: Ints, most: int, name: str) -> None:
    if found.size and not (found.min() >= 0 and found.max() < most):
        raise ValueError(
            f"{name} must be between 0 and {most - 1}, found {found.min()} to {found.max()}"
        )
