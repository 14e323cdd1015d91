"""Weights and batches for one kind of layer, and what plain PyTorch makes of them in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.plan import BatchPlan, PlanLayout
from multilora_kernels.trial.kinds import LayerKind


@dataclass(frozen=True)
class Weights:
    """A layer's slots, filled.

    Attributes:
        a: Per slice, [slots, 1, a_rank, inputs]; empty where the call expands.
        b: Per slice, [slots, 1, width, b_rank]; empty where the call shrinks.
        ranks: int32 [slices, slots], true ranks.
    """

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    ranks: torch.Tensor


@dataclass(frozen=True)
class TrialBatch:
    """A step for one call.

    Attributes:
        slots: [rows], the slot of each row, -1 for none.
        plan: The same for kernels.
        given: [rows, inputs], or [slices, rows, inputs] where the call expands.
        out: What is added to or overwritten; [rows, columns], or [slices, rows, a_rank].
    """

    slots: npt.NDArray[np.int64]
    plan: BatchPlan
    given: torch.Tensor
    out: torch.Tensor


class TrialProblem:
    """One kind of layer with slots of mixed ranks, 0 included.

    Products are about as large as what they are added to, whatever the rank, so that every error
    shows.

    Args:
        kind: The kind.
        device: Where it is computed.
        max_tokens: The largest number of rows of the server's steps.
    """

    def __init__(self, kind: LayerKind, device: torch.device, max_tokens: int) -> None:
        self.kind, self.device = kind, device
        self.layout = PlanLayout(max_tokens, kind.slots, slot_runs=True)
        self._generator = torch.Generator(device).manual_seed(0)
        self._ranks = _mixed_ranks(kind)
        a, b = [], []
        for _ in range(kind.slices if kind.a_rank else 0):
            shape = kind.slots, 1, kind.a_rank, kind.inputs
            a.append(self._filled(self._empty(shape), np.full(kind.slots, kind.inputs)))
        for ranks, width in zip(self._ranks, kind.widths, strict=bool(kind.widths)):
            shape = kind.slots, 1, width, kind.b_rank
            b.append(self._filled(self._empty(shape, by_column=kind.by_column), ranks))
        ranks = torch.tensor(self._ranks, dtype=torch.int32, device=device)
        self.weights = Weights(tuple(a), tuple(b), ranks)

    def _empty(self, shape: tuple[int, int, int, int], *, by_column: bool = False) -> torch.Tensor:
        dtype = self.kind.dtypes[0]
        if not by_column:
            return torch.empty(shape, dtype=dtype, device=self.device)
        slots, one, rows, columns = shape
        return torch.empty(slots, one, columns, rows, dtype=dtype, device=self.device).mT

    def _filled(self, weights: torch.Tensor, terms: npt.NDArray[np.int64]) -> torch.Tensor:
        """Random weights whose sums of so many terms, by slot, are about 1; one slot at a time."""
        for slot, count in enumerate(terms.tolist()):
            weights[slot].copy_(self._random(*weights[slot].shape) * max(count, 1) ** -0.5)
        return weights

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device)

    def fill_rests(self, value: float) -> None:
        """Fills the weights past the true ranks: with zeros, or with what must not be read."""
        for i, ranks in enumerate(self._ranks):
            for slot, rank in enumerate(ranks.tolist()):
                if self.weights.a:
                    self.weights.a[i][slot, :, rank:].fill_(value)
                if self.weights.b:
                    self.weights.b[i][slot, :, :, rank:].fill_(value)

    def mixed_batch(self, rows: int) -> TrialBatch:
        """Rows of many slots in any order, some without an adapter; a third of the slots idle."""
        random = np.random.default_rng(rows)
        used = [slot for slot in range(self.kind.slots) if slot % 3 != 2]
        slots = random.choice([-1, *used], rows)
        slots[0] = 0  # of the highest rank
        return self._batch(slots)

    def timed_batches(self, rows: int) -> list[TrialBatch]:
        """One adapter of the highest rank; and many of mixed ranks, as many as rows or slots."""
        one, many = np.zeros(rows, np.int64), np.arange(rows) % self.kind.slots
        return [self._batch(one)] if rows == 1 else [self._batch(one), self._batch(many)]

    def _batch(self, slots: npt.NDArray[np.int64]) -> TrialBatch:
        kind, rows = self.kind, len(slots)
        _, given_type, out_type = kind.dtypes
        plan = BatchPlan(self.layout, self.device)
        plan.sends_slot_runs = True
        plan.update(slots)
        given = self._random(rows, kind.inputs).to(given_type)
        if kind.operation == "shrink":
            shape = kind.slices, rows, kind.a_rank
            return TrialBatch(
                slots, plan, given, torch.full(shape, 3.0, device=self.device).to(out_type)
            )
        if kind.operation == "expand":
            given = self._random(kind.slices, rows, kind.inputs).to(given_type)
        return TrialBatch(slots, plan, given, self._random(rows, kind.columns).to(out_type))

    def expected(self, batch: TrialBatch) -> torch.Tensor:
        """The right result in float32, of the shape of `batch.out`."""
        kind, out = self.kind, batch.out.to(torch.float32, copy=True)
        begin = kind.offset
        if kind.operation == "shrink":
            out.zero_()
        elif not kind.add_inputs:
            out[:, begin : begin + sum(kind.widths)] = 0
        for slot in np.unique(batch.slots[batch.slots >= 0]).tolist():
            rows = torch.tensor(np.flatnonzero(batch.slots == slot), device=self.device)
            start = begin
            for i in range(kind.slices):
                rank = int(self._ranks[i, slot])
                if kind.operation == "expand":
                    h = batch.given[i, rows, :rank].float()
                else:
                    h = batch.given[rows].float() @ self.weights.a[i][slot, 0, :rank].float().T
                if kind.operation == "shrink":
                    out[i, rows, :rank] = h
                    continue
                span = slice(start, start := start + kind.widths[i])
                out[rows, span] += h @ self.weights.b[i][slot, 0, :, :rank].float().T
        return out


def _mixed_ranks(kind: LayerKind) -> npt.NDArray[np.int64]:
    """[slices, slots]; slot 0 has the highest rank in all slices."""
    most = kind.max_rank
    levels = [most, max(1, most // 8), min(5, most), 0, max(1, most // 2)]
    slots, slices = np.arange(kind.slots), np.arange(kind.slices)[:, None]
    ranks: npt.NDArray[np.int64] = np.array(levels)[(slots + slices) % len(levels)]
    ranks[:, 0] = most
    return ranks
