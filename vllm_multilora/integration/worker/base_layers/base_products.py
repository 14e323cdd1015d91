"""How base layers multiply on a CPU where the plugin computes the adapters.

AMX multiplies tiles of 32 columns of 16 bits. Two of vLLM's kernels read beyond their own data to
fill a tile, and multiply what they read by zero. If another request of the step has left a NaN or
an infinity there, the result is NaN. The two are vLLM's attention for AMX, and oneDNN's products of
rows whose length is not a multiple of a tile's, where the next row begins right after the end of a
row. Both were seen with vLLM 0.32. The same kernels without AMX, and rows that fill their tiles,
keep requests apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, pad
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform

from multilora_kernels.native.packed_linear import PackedLinear, pack
from vllm_multilora.integration import kv_blocks
from vllm_multilora.integration.patching.activation import (
    is_active,
    kernel_backend,
    settings_of,
)
from vllm_multilora.integration.worker.model.row_squares import keep_row_squares

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_TILE_COLUMNS = 32


def attention_isa(original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    """Which of vLLM's attention kernels a CPU takes: where it is AMX's, the one for vectors."""
    isa = original(*args, **kwargs)
    return "vec" if isa == "amx" and kv_blocks.empties_blocks else isa


def fill_tiles(
    original: Callable[[torch.nn.Module, bool], None], layer: Any, remove_weight: bool
) -> None:
    """Has vLLM choose how a layer multiplies rows that fill their tiles."""
    weight = layer.weight
    excess = -weight.size(-1) % _TILE_COLUMNS
    if not excess or weight.dtype.itemsize != 2:
        original(layer, remove_weight)
        return
    filled = pad(weight.detach(), (0, excess))
    layer.weight = torch.nn.Parameter(filled, requires_grad=False)
    original(layer, remove_weight)
    multiply = layer.cpu_linear
    if not remove_weight or multiply is linear:
        layer.weight = weight

    def cpu_linear(
        x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return multiply(pad(x, (0, excess)), filled, bias)

    layer.cpu_linear = cpu_linear


def dispatch_gemm(
    original: Callable[[torch.nn.Module, bool], None], layer: Any, remove_weight: bool
) -> None:
    """Chooses how a layer multiplies by its weights.

    With AMX that is vLLM's way, with rows that fill their tiles. Without, it is the C kernels'
    where they can: they take less time for few rows, so that decoding with adapters takes about as
    long as it takes vLLM without any.

    Where DoRA adapters are served, the lengths of a linear layer's rows are kept before.
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
