"""Which kernels compute experts on CPUs: with adapters the plugin's, without them vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from multilora_kernels import native
from multilora_kernels.experts import ACTIVATIONS
from vllm_multilora.errors import ConfigError

try:
    from vllm_multilora.integration.worker.experts.adapted_experts import adapted
except ImportError:  # before 0.32, whose experts choose the rows' experts themselves
    adapted = None  # type: ignore[assignment]

_NO_ADAPTERS = "adapters of experts on CPUs need {}"


def choose_expert_kernels(model: torch.nn.Module) -> None:
    """Has experts on CPUs computed by kernels that run there.

    With LoRA on, vLLM chooses Triton's kernels for experts on CPUs, too, and the first step would
    fail where there is no Triton.

    Raises:
        ConfigError: The experts' weights are in a form for these kernels alone.
    """
    if not current_platform.is_cpu():
        return
    for name, runner in _experts(model):
        experts = runner.routed_experts
        method = experts.quant_method
        if type(method) is not UnquantizedFusedMoEMethod:
            if HAS_TRITON:
                continue
            raise ConfigError(
                f"the experts in {name} are quantised ({type(method).__name__}), and vLLM's CPU "
                f"build computes such experts with --enable-lora in Triton only, which is not "
                f"there: serve a base model without quantised experts, or leave --enable-lora out"
            )
        own = UnquantizedFusedMoEMethod(replace(method.moe, is_lora_enabled=False))
        if not _missing(runner, own):
            own = _AdaptedMethod(own.moe)
        own.process_weights_after_loading(experts)
        runner._replace_quant_method(own)


def experts_left_alone(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Names of experts' layers that have no adapters, and why."""
    for name, runner in _experts(model):
        method = runner.routed_experts.quant_method
        if type(method) is UnquantizedFusedMoEMethod and not method.moe.is_lora_enabled:
            yield name, _missing(runner, method)


class _AdaptedMethod(UnquantizedFusedMoEMethod):
    """vLLM's method for experts, whose kernel computes adapters of these as well."""

    def __init__(self, moe: Any) -> None:
        super().__init__(moe)
        self.experts_cls = adapted(self.experts_cls, moe)


def _missing(runner: MoERunner, method: UnquantizedFusedMoEMethod) -> str:
    """Why this layer's experts have no adapters; empty if they have."""
    config, lora_config = runner.moe_config, get_current_vllm_config().lora_config
    parallel: Any = config.moe_parallel_config
    needed = ""
    if adapted is None or adapted(method.experts_cls, config) is None:
        needed = "a vLLM from 0.32 on whose experts the plugin knows, on an x86-64 processor"
    elif not native.is_available():
        needed = "a C compiler"
    elif config.in_dtype not in (torch.float32, torch.bfloat16):
        needed = "--dtype bfloat16 or float32"
    elif config.activation.value not in ACTIVATIONS or not config.is_act_and_mul:
        needed = f"other activations than {config.activation.value}"
    elif config.activation.value == "swigluoai" and _in_parts(lora_config):
        needed = "gates and what they multiply as one: no --enable-mixed-moe-lora-format"
    elif parallel.use_ep or parallel.dp_size > 1:
        needed = "experts that each worker has all of: no expert or data parallelism"
    elif lora_config is not None and lora_config.fully_sharded_loras and parallel.tp_size > 1:
        needed = "whole slots: no --fully-sharded-loras"
    elif lora_config is not None and getattr(lora_config, "enable_moe_shared_loras", False):
        needed = "slots of each expert: no --enable-moe-shared-loras"
    elif config.hidden_dim != (config.hidden_dim_unpadded or config.hidden_dim):
        needed = "experts without padding"
    return _NO_ADAPTERS.format(needed) if needed else ""


def _in_parts(lora_config: Any) -> bool:
    """Whether slots have gates apart from what they multiply, whichever way the model has them."""
    return bool(getattr(lora_config, "enable_mixed_moe_lora_format", False))


def _experts(model: torch.nn.Module) -> Iterator[tuple[str, MoERunner]]:
    for name, part in model.named_modules():
        if isinstance(part, MoERunner):
            yield name, part
