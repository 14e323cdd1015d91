"""Routers and gates that mixtures of experts call by names of their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import replace_submodule


def adapt_held_gates(model: torch.nn.Module, modules: Mapping[str, BaseLayerWithLoRA]) -> None:
    """Puts LoRA layers in the place of the gates that they wrap, wherever a mixture holds these.

    vLLM wraps `mlp.gate`, and Qwen3-MoE and DeepSeek call it as `mlp.experts.gate`, and Qwen2-MoE
    `mlp.shared_expert_gate` as `mlp.shared_expert.expert_gate`: adapters would have no effect.

    Args:
        model: The model, with LoRA layers in it.
        modules: These, by name.
    """
    layers = [each for each in modules.values() if isinstance(each, BaseLinearLayerWithLoRA)]
    wrappers = {id(layer.base_layer): layer for layer in layers}
    for name, part in [*model.named_modules(remove_duplicate=False)]:
        if name.endswith("gate") and id(part) in wrappers:
            replace_submodule(model, name, wrappers[id(part)])
