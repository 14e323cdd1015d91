"""The slots of experts' adapters, and the true ranks of what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from multilora_kernels.experts import ACTIVATIONS, ExpertAdapters, ExpertProducts, PackedExperts
from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper
from vllm_multilora.integration.step.punica_prepared import OURS
from vllm_multilora.integration.worker.experts.uneven_experts import EXPERT_RANKS


class ExpertSlots:
    """Slots of the layers whose experts the plugin computes; vLLM's kernels read the others'.

    Args:
        modules: All LoRA layers, by name; vLLM has just made their slots.
    """

    def __init__(self, modules: Mapping[str, BaseLayerWithLoRA]) -> None:
        self._layers: dict[str, Any] = {}
        found = {n: each for n, each in modules.items() if isinstance(each, FusedMoEWithLoRA)}
        self._modules: dict[str, Any] = found
        if not found:
            return
        try:
            from vllm_multilora.integration.worker.experts.adapted_experts import AdaptedExperts
        except ImportError:  # before vLLM 0.32
            return
        for name, module in self._modules.items():
            experts = module.quant_method.moe_kernel.fused_experts
            if isinstance(experts, AdaptedExperts):
                self._layers[name] = experts
                products, wrapper = _products(module, experts), module.punica_wrapper
                experts.take_slots(products, module.max_loras, wrapper)

    def take_kernels(self, kernels: str, wrapper: MultiLoRAPunicaWrapper) -> None:
        """Has the Triton kernels compute experts, where they are asked for and can."""
        for name, module in self._modules.items() if kernels == OURS else ():
            from vllm_multilora.integration.worker.experts.gpu_experts import GpuExperts

            of_vllm = type(module.quant_method.moe_kernel.fused_experts).__module__
            is_whole = not (module.fully_sharded or module.enable_moe_shared_loras)
            if "triton" in wrapper.backend and is_whole and "trtllm" not in of_vllm:
                invariant = wrapper.backend == "triton-invariant"
                self._layers[name] = GpuExperts(module, wrapper.plan, invariant)
                module.set_mapping(self._layers[name])
                wrapper.read_slot_runs()

    def set_ranks(
        self, slot: int, name: str, weights: LoRALayerWeights | None, lora: LoRAModel | None
    ) -> None:
        """Says what a slot holds of a layer from now on; nothing, if it is not one of these."""
        experts = self._layers.get(name)
        if experts is None:
            return
        if weights is None:
            experts.clear(slot)
        else:
            # Gate, down and up, or both and down.
            ranks = (EXPERT_RANKS.get(lora) or {}).get(name) or [a.shape[1] for a in weights.lora_a]
            experts.fill(slot, ranks[::2], ranks[1])


def _products(module: Any, experts: Any) -> ExpertProducts:
    """What computes a layer's rows with adapters, from the slots that vLLM has made."""
    from vllm_multilora.integration.worker.experts.adapted_experts import packed_word

    for b in (*module.w13_lora_b_stacked, *module.w2_lora_b_stacked):
        _store_by_column(b)
    # Views of each expert's matrices in each slot, which only vLLM's own warm-up would use.
    for views in (getattr(module, f"lora_{matrix}_stacked", None) for matrix in "ab"):
        if isinstance(views, list):
            views.clear()
    layer, word = module.runner.routed_experts, packed_word(experts.isa)
    adapters = ExpertAdapters(
        module.w13_lora_a_stacked,
        module.w13_lora_b_stacked,
        module.w2_lora_a_stacked[0],
        module.w2_lora_b_stacked[0],
    )
    return ExpertProducts(
        PackedExperts(layer.w13_weight, word, experts.w1_bias),
        PackedExperts(layer.w2_weight, word, experts.w2_bias),
        adapters,
        ACTIVATIONS[experts.moe_config.activation.value],
    )


def _store_by_column(b: torch.Tensor) -> None:
    """Stores zeros [slots, experts, outputs, ranks] with each column contiguous, in their place."""
    _, experts, outputs, ranks = b.shape
    b.as_strided_(b.shape, (experts * outputs * ranks, outputs * ranks, 1, outputs))
