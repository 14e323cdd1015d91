"""Quantised checkpoints of a tiny Llama, and the same weights again in float32 as the truth.

Weights are rounded to the nearest; formats are those of GPTQ, AWQ and compressed-tensors.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .tiny_models import write_llama

GROUP = 32
"""Inputs that share a scale."""

Parts = dict[str, torch.Tensor]
"""What a checkpoint has in the place of a layer's weight, by the names below the layer's."""


@dataclass(frozen=True)
class Scheme:
    """A way to quantise a linear layer.

    Attributes:
        config: The checkpoint's `quantization_config`.
        quantise: From a weight of shape [outputs, inputs]: what is stored, and the weight that it
            stands for.
        rounds_inputs: Activations are rounded to 8 bits, too, a token at a time.
    """

    name: str
    config: Mapping[str, Any]
    quantise: Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
    rounds_inputs: bool = False


def write(root: Path, scheme: Scheme) -> tuple[Path, Path]:
    """Writes the quantised checkpoint, and one of the weights that it stands for.

    Returns:
        Their folders.
    """
    truth = write_llama(root / "truth", mlp=192)
    base = root / "quantised"
    shutil.copytree(truth, base)
    stored, meant = {}, {}
    for name, weight in load_file(truth / "model.safetensors").items():
        parts, meant[name] = (
            scheme.quantise(weight)
            if name.endswith("_proj.weight")
            else ({"weight": weight}, weight)
        )
        stored.update({name.removesuffix("weight") + part: value for part, value in parts.items()})
    save_file(meant, truth / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = scheme.config
    (base / "config.json").write_text(json.dumps(config))
    return base, truth


def round_inputs(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook that rounds a layer's inputs as kernels for 8-bit activations do."""
    x, *rest = inputs
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return ((x / scale).round() * scale, *rest)


@dataclass(frozen=True)
class _FourBits:
    """Numbers from 0 to 15 and what they stand for.

    Attributes:
        numbers: Of shape [outputs, inputs].
        zeros: The numbers that stand for 0, of shape [outputs, groups].
        scales: Steps between numbers, float16 of shape [outputs, groups].
    """

    numbers: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """Float32 of shape [outputs, inputs]."""
        groups = self.numbers.unflatten(1, (-1, GROUP))
        scales = self.scales.float()[..., None]
        return ((groups - self.zeros[..., None]) * scales).flatten(1)


def _four_bits(weight: torch.Tensor, *, symmetric: bool) -> _FourBits:
    groups = weight.unflatten(1, (-1, GROUP))
    if symmetric:
        scales = (groups.abs().amax(dim=-1) / 7).half()
        zeros = torch.full_like(scales, 8.0, dtype=torch.float32)
    else:
        low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
    numbers = (groups / scales.float()[..., None]).round() + zeros[..., None]
    return _FourBits(numbers.clamp(0, 15).flatten(1), zeros, scales)


def _packed(numbers: torch.Tensor) -> torch.Tensor:
    """Eight numbers of the last dimension in an int32, the first one lowest."""
    shifted = numbers.to(torch.int64).unflatten(-1, (-1, 8)) << (4 * torch.arange(8))
    words = shifted.sum(dim=-1)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32).contiguous()


def _gptq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    four = _four_bits(weight, symmetric=True)
    parts = {
        "qweight": _packed(four.numbers).T.contiguous(),
        "qzeros": _packed(four.zeros.T - 1),  # the format's own offset
        "scales": four.scales.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return parts, four.weight


def _awq(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    four = _four_bits(weight, symmetric=False)

    def packed(numbers: torch.Tensor) -> torch.Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return _packed(numbers.unflatten(-1, (-1, 8))[..., order].flatten(-2))

    parts = {
        "qweight": packed(four.numbers.T),
        "qzeros": packed(four.zeros.T),
        "scales": four.scales.T.contiguous(),
    }
    return parts, four.weight


def _packed_rows(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    four = _four_bits(weight, symmetric=True)
    parts = {
        "weight_packed": _packed(four.numbers),
        "weight_scale": four.scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, four.weight


def _eight_bits(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    numbers = (weight / scales).round()
    return {"weight": numbers.to(torch.int8), "weight_scale": scales}, numbers * scales


def _compressed(how: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": how,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_INT = {"type": "int", "symmetric": True}

SCHEMES = (
    Scheme(
        "gptq",
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        _gptq,
    ),
    Scheme(
        "awq",
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
        _awq,
    ),
    Scheme(
        "compressed-w4a16",
        _compressed(
            "pack-quantized",
            {**_INT, "num_bits": 4, "strategy": "group", "group_size": GROUP},
            None,
        ),
        _packed_rows,
    ),
    Scheme(
        "compressed-w8a8",
        _compressed(
            "int-quantized",
            {**_INT, "num_bits": 8, "strategy": "channel"},
            {**_INT, "num_bits": 8, "strategy": "token", "dynamic": True},
        ),
        _eight_bits,
        rounds_inputs=True,
    ),
)
"""Formats that vLLM's CPU build runs: it lacks FP8 kernels."""
