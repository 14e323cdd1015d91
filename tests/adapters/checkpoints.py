"""Adapters on disk for the tests of this folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from multilora_kernels.dtypes import of_torch
from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout
from vllm_multilora.adapters.model.tensor_names import parse_tensor_name

PREFIX = "base_model.model."
# Name, inputs, outputs: small, odd, and none a multiple of 64 bytes.
MODULES = (
    ("model.layers.0.self_attn.q_proj", 24, 40),
    ("model.layers.0.self_attn.v_proj", 24, 12),
    ("model.layers.0.mlp.down_proj", 70, 24),
    ("model.layers.1.self_attn.q_proj", 24, 40),
    ("model.layers.1.mlp.down_proj", 70, 24),
)


def weights(
    ranks: dict[str, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random A and B of the modules with a rank, under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, inputs, outputs in MODULES:
        if rank := ranks.get(module):
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = torch.randn(shape, generator=generator)
                tensors[f"{PREFIX}{module}.lora_{part}.weight"] = values.to(dtype)
    return tensors


def write(
    folder: Path, tensors: dict[str, torch.Tensor], rank: int, alpha: float, **config: object
) -> Path:
    """Writes an adapter as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    roles = (parse_tensor_name(name) for name in tensors)
    targets = sorted({role.module.rpartition(".")[2] for role in roles if role})
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    return folder


def config_of(text: str | bytes) -> AdapterConfig:
    """A configuration; what is wrong with it is raised."""
    config, problems = AdapterConfig.read(text, "c.json")
    if config is None:
        raise AdapterFormatError.of(*problems)
    return config


def layout(dtype: torch.dtype = torch.float32, **options: object) -> ModelLayout:
    """The layout of the modules above on a worker that keeps all of them whole."""
    slices = tuple(
        SliceLayout(name, row, inputs, outputs, (0, inputs), (0, outputs))
        for row, (name, inputs, outputs) in enumerate(MODULES)
    )
    defaults: dict = {
        "slices": slices,
        "max_rank": 16,
        "dtype": of_torch(dtype),
        "columns_first": False,
    }
    return ModelLayout(**(defaults | options))
