"""Experts without adapters, where vLLM has no kernels that compute adapters of experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from vllm_multilora.errors import ConfigError


def leave_experts_alone(model: torch.nn.Module) -> None:
    """Has experts computed as without LoRA where vLLM cannot run the kernels it has with LoRA.

    With LoRA on, vLLM chooses Triton's kernels for experts on CPUs, too, and the first step would
    fail where there is no Triton.

    Raises:
        ConfigError: The experts' weights are in a form for these kernels alone.
    """
    if not current_platform.is_cpu() or HAS_TRITON:
        return
    for name, runner in _experts(model):
        experts = runner.routed_experts
        method = experts.quant_method
        if type(method) is not UnquantizedFusedMoEMethod:
            raise ConfigError(
                f"the experts in {name} are quantised ({type(method).__name__}), and vLLM's CPU "
                f"build computes such experts with --enable-lora in Triton only, which is not "
                f"there: serve a base model without quantised experts, or leave --enable-lora out"
            )
        for config in (runner.moe_config, experts.moe_config, method.moe):
            config.is_lora_enabled = False
        own = UnquantizedFusedMoEMethod(method.moe)
        own.process_weights_after_loading(experts)
        runner._replace_quant_method(own)


def experts_left_alone(model: torch.nn.Module) -> Iterator[str]:
    """Names of the experts' layers that `leave_experts_alone` has made their own kernels for."""
    return (name for name, of in _experts(model) if not of.moe_config.is_lora_enabled)


def _experts(model: torch.nn.Module) -> Iterator[tuple[str, MoERunner]]:
    for name, part in model.named_modules():
        if isinstance(part, MoERunner):
            yield name, part
