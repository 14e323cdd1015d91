"""Adapters of some of a layer's experts, or of experts at several ranks, in the form vLLM packs.

vLLM packs all projections of all experts of a layer at one rank each. Zeros stand for what an
adapter leaves alone; the ranks that count are kept beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from vllm_multilora.adapters.model.layout import LinearShape
from vllm_multilora.integration.attached import Attached

EXPERT_RANKS: Attached[dict[str, list[list[int]]]] = Attached("expert ranks")
"""By layer, for each projection in vLLM's order, each expert's rank; uneven layers only."""


def even_out(
    lora: LoRAModel,
    packed: Mapping[str, Sequence[str]],
    shapes: Mapping[str, LinearShape],
) -> None:
    """Fills up layers whose experts an adapter holds one by one, and not all, or not alike.

    Args:
        lora: The adapter, by the running model's names; its matrices are scaled where they change.
        packed: By layer, the modules that make it up, as of the manager's `packed_modules`.
        shapes: As of `ModelLayout.linear_shapes`.
    """
    for layer, sources in packed.items():
        if not all(source in shapes for source in sources) or lora.loras.keys().isdisjoint(sources):
            continue
        kinds: dict[str, list[str]] = {}
        for source in sources:
            if ".experts." in source:
                kinds.setdefault(source.rpartition(".")[2], []).append(source)
        ranks = [[_rank(lora, source) for source in of_kind] for of_kind in kinds.values()]
        if all(0 < min(own) == max(own) for own in ranks):
            continue
        EXPERT_RANKS.get_or_make(lora, dict)[layer] = ranks
        for of_kind, own in zip(kinds.values(), ranks, strict=True):
            for source in of_kind:
                lora.loras[source] = _padded(lora, source, shapes[source], max(1, *own))


def _rank(lora: LoRAModel, source: str) -> int:
    found = lora.get_lora(source)
    return 0 if found is None else found.lora_b.shape[-1]


def _padded(lora: LoRAModel, source: str, shape: LinearShape, rank: int) -> LoRALayerWeights:
    """A module's weights at a rank that may be higher than its own."""
    found = lora.get_lora(source)
    if found is not None:
        a, b = found.optimize().lora_a, found.lora_b
        missing = rank - b.shape[-1]
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    else:
        like = next(iter(lora.loras.values())).lora_a
        of_a, of_b = ([] if shape.matrices is None else [n] for n in shape.matrices or (1, 1))
        a = torch.zeros(*of_a, rank, shape.inputs, dtype=like.dtype)
        b = torch.zeros(*of_b, shape.outputs, rank, dtype=like.dtype)
    return LoRALayerWeights(source, rank, rank, a, b, scaling=1)
