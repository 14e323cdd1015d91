"""Whether a contender computes what it should, looked at before anybody times it."""

from __future__ import annotations

import math

import torch

from tools.kernels.measure.batches import LayerBatch
from tools.kernels.measure.timing import Call

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative RMS error that rounding explains, by dtype of y; what is wrong is off by far more."""


class Expected:
    """The right answer for a batch, in float64, an adapter at a time.

    Args:
        batch: Its y is overwritten by every check.
    """

    def __init__(self, batch: LayerBatch) -> None:
        self._batch = batch
        self._ranks = batch.spec.slot_ranks()
        slots = torch.from_numpy(batch.token_slots)
        self._rows = {
            int(slot): (slots == slot).nonzero()[:, 0].to(batch.x.device)
            for slot in slots.unique().tolist()
        }

    def relative_error(self, call: Call) -> float:
        """The RMS error of two calls over the RMS of the right answer.

        y starts at zero and two calls must make it twice the product: so a contender that
        overwrites, that leaves rows out or that touches rows without an adapter shows.

        Returns:
            0 where all is zero as it should be; infinity where it should but is not, and for
            anything that is not finite.
        """
        batch = self._batch
        batch.y.zero_()
        call()
        call()
        error = torch.zeros((), dtype=torch.float64, device=batch.y.device)
        size = torch.zeros_like(error)
        for slot, rows in self._rows.items():
            found = batch.y[rows].double()
            if slot >= 0:
                right = 2 * self._product(slot, rows)
                size += right.pow(2).sum()
                found -= right
            error += found.pow(2).sum()
        if not math.isfinite(error.item()):
            return math.inf
        if size.item() == 0:
            return math.inf if error.item() else 0.0
        return math.sqrt(error.item() / size.item())

    def _product(self, slot: int, rows: torch.Tensor) -> torch.Tensor:
        rank, x = int(self._ranks[slot]), self._batch.x[rows].double()
        return torch.cat(
            [
                x @ a[slot, 0, :rank].double().T @ b[slot, 0, :, :rank].double().T
                for a, b in zip(self._batch.lora_a, self._batch.lora_b, strict=True)
            ],
            dim=1,
        )
