"""What a layer of experts accepts of an adapter on this worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vllm.lora.layers import FusedMoEWithLoRA

from vllm_multilora.adapters.model.layout import LinearShape


def has_filled_experts(module: FusedMoEWithLoRA) -> bool:
    """Whether a rank's experts are those of its turn: neither dealt out, moved nor one more.

    vLLM fills as many as a rank has, from the rank's place times their number on.
    """
    base: Any = module.base_layer
    if getattr(base, "eplb_state", None) is not None:  # moves them while the model serves
        return False
    places = base.routed_experts.expert_map_manager.expert_map
    if places is None:  # it has all of them
        return True
    count = module.local_num_experts
    return places[module.ep_rank * count :][:count].tolist() == list(range(count))


def expert_shapes(
    name: str, module: FusedMoEWithLoRA, sources: Sequence[str]
) -> Iterator[tuple[str, LinearShape]]:
    """A layer's experts, held as one and, where `sources` names them, one by one."""
    config = module.moe_config
    count, width = config.num_logical_experts, config.hidden_dim_unpadded or config.hidden_dim
    inner = config.intermediate_size
    yield name, LinearShape(inner, width, count)
    gated = config.is_act_and_mul
    yield f"{name}.base_layer", LinearShape(width, 2 * inner if gated else inner, count, gated)
    if module.enable_moe_shared_loras:  # one matrix of the experts' outer ones, one of each inner
        w1, w2, w3 = sources
        yield w2, LinearShape(inner, width, matrices=(count, 1))
        yield from ((w, LinearShape(width, inner, matrices=(1, count))) for w in (w1, w3))
        return
    each = len(sources) // count  # of one expert: gate, down and up, or up and down
    for place, source in enumerate(sources if each > 1 and not len(sources) % count else ()):
        is_down = place % each == 1
        yield source, LinearShape(inner, width) if is_down else LinearShape(width, inner)
