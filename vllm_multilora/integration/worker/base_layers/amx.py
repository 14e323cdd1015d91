"""Keeps one request's numbers out of its neighbours' on processors with AMX.

AMX multiplies tiles of 32 columns of 16 bits. Two of vLLM's kernels read beyond their own data to
fill a tile, and multiply what they read by zero. If another request of the step has left a NaN or
an infinity there, the result is NaN. The two are vLLM's attention for AMX, and oneDNN's products of
rows whose length is not a multiple of a tile's, where the next row begins right after the end of a
row. Both were seen with vLLM 0.32. The same kernels without AMX, and rows that fill their tiles,
keep requests apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear, pad

from vllm_multilora.integration import kv_blocks

_TILE_COLUMNS = 32


def attention_isa(original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    """Which of vLLM's attention kernels a CPU takes: where it is AMX's, the one for vectors."""
    isa = original(*args, **kwargs)
    return "vec" if isa == "amx" and kv_blocks.empties_blocks else isa


def fill_tiles(
    original: Callable[[torch.nn.Module, bool], None], layer: Any, remove_weight: bool
) -> None:
    """Has vLLM choose how a layer multiplies rows that fill their tiles.

    Args:
        original: vLLM's, which sets `layer.cpu_linear`.
        layer: With `weight`, [rows, columns].
        remove_weight: Whether nobody reads the weight itself afterwards.
    """
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
        y: torch.Tensor = multiply(pad(x, (0, excess)), filled, bias)
        return y

    layer.cpu_linear = cpu_linear
