"""How base layers multiply on a CPU where the plugin computes the adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform

from multilora_kernels.native.packed_linear import PackedLinear, pack
from vllm_multilora.integration.patching.activation import (
    is_active,
    kernel_backend,
    settings_of,
)
from vllm_multilora.integration.worker.base_layers.amx import fill_tiles
from vllm_multilora.integration.worker.model.row_squares import keep_row_squares

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def dispatch_gemm(
    original: Callable[[torch.nn.Module, bool], None], layer: Any, remove_weight: bool
) -> None:
    """Chooses how a layer multiplies by its weights.

    With AMX that is vLLM's way, with rows that fill their tiles. Without, it is the C kernels'
    where they can: they take less time for few rows, so that decoding with adapters takes about as
    long as it takes vLLM without any.

    Where DoRA adapters are served, the lengths of a linear layer's rows are kept before.

    Args:
        original: vLLM's, which sets `layer.cpu_linear`.
        layer: With `weight`.
        remove_weight: Whether nobody reads the weight itself afterwards.
    """
    weight, config = layer.weight, get_current_vllm_config_or_none()
    if weight.is_meta or weight.dim() != 2 or config is None or not is_active(config):
        original(layer, remove_weight)
        return
    if remove_weight and settings_of(config).dora:
        keep_row_squares(layer)
    if torch.cpu._is_amx_tile_supported():
        fill_tiles(original, layer, remove_weight)
    elif packed := _packed(weight, config):
        layer.cpu_linear = packed
        if remove_weight:
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
    else:
        original(layer, remove_weight)


def _packed(weight: torch.Tensor, config: VllmConfig) -> PackedLinear | None:
    # vLLM has kernels of AMD's in oneDNN's place, where they are installed.
    if kernel_backend(config) != "native" or current_platform.is_zen_cpu():
        return None
    return pack(weight)
