"""What anybody could write instead of a kernel, and the layer that adapters are added to."""

from __future__ import annotations

import torch

from tools.kernels.measure.batches import LayerBatch
from tools.kernels.measure.timing import Call


class GemmLoop:
    """A loop over the active adapters: gather rows, two products a slice, add rows back.

    Products are the vendor's (cuBLAS, rocBLAS, oneDNN), over true ranks. Which rows belong to
    which adapter is worked out beforehand, once per step. Captured into a graph, the launches
    cost the host nothing, so this is the loop at its best.
    """

    name = "loop of torch.mm"

    def prepare(self, batch: LayerBatch) -> Call:
        """See `tools.kernels.measure.contenders.Contender`."""
        x, y = batch.x, batch.y
        ranks = batch.spec.slot_ranks()
        slots = torch.from_numpy(batch.token_slots)
        widths = batch.spec.layer.outputs
        parts = []
        for slot in sorted({int(slot) for slot in batch.token_slots} - {-1}):
            rows = (slots == slot).nonzero()[:, 0].to(x.device)
            rank = int(ranks[slot])
            factors = [
                (a[slot, 0, :rank].T, b[slot, 0, :, :rank].T, span)
                for a, b, span in zip(
                    batch.lora_a, batch.lora_b, y.split(list(widths), dim=1), strict=True
                )
            ]
            parts.append((rows, factors))

        def call() -> None:
            for rows, factors in parts:
                own = x.index_select(0, rows)
                for a, b, span in factors:
                    span.index_add_(0, rows, torch.mm(torch.mm(own, a), b))

        return call


class BaseLayer:
    """The product of the layer itself, for comparison: what a batch without LoRA costs.

    It writes to an output of its own and computes no adapter, so it is no contender.
    """

    name = "base layer"

    def prepare(self, batch: LayerBatch) -> Call:
        """The layer's product over the batch's x, with a weight and an output of its own."""
        layer, x = batch.spec.layer, batch.x
        weight = torch.empty(sum(layer.outputs), layer.inputs, dtype=x.dtype, device=x.device)
        weight.normal_(0.0, layer.inputs**-0.5)
        out = torch.empty(x.size(0), weight.size(0), dtype=x.dtype, device=x.device)

        def call() -> None:
            torch.mm(x, weight.T, out=out)

        return call
