"""An adapter that has not been written yet, so that single things of it can be changed."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .llama_layout import HIDDEN, MODULES, VOCABULARY

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
RANK, ALPHA = 8, 16
GAIN = 0.5  # of an adapted module's delta, relative to an input of unit variance

Q0 = "model.layers.0.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"
DOWN2 = "model.layers.2.mlp.down_proj"


@dataclass
class Draft:
    """An adapter in the making.

    Attributes:
        config: What will be in `adapter_config.json`.
        tensors: What will be in `adapter_model.safetensors`.
        metadata: The header's `__metadata__`.
        afterwards: What is done to the folder once the files are there.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})
    afterwards: list[Callable[[Path], object]] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Writes the files; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config))
        save_file(self.tensors, folder / WEIGHTS, self.metadata)
        for step in self.afterwards:
            step(folder)
        return folder

    def rename(self, change: Callable[[str], str]) -> None:
        """Renames every tensor."""
        self.tensors = {change(name): tensor for name, tensor in self.tensors.items()}


def name_of(module: str, part: str) -> str:
    """The name that PEFT gives to a linear module's A or B."""
    return f"{PREFIX}{module}.lora_{part}.weight"


def set_rank(draft: Draft, module: str, rank: int, alpha: float = ALPHA, seed: int = 1) -> None:
    """Gives a module new weights of a rank."""
    draft.tensors |= pair(module, rank, alpha / rank, seed=seed)


def pair(module: str, rank: int, scaling: float, *, seed: int) -> dict[str, torch.Tensor]:
    """A and B of a linear module, of a size that shows in the outputs."""
    inputs, outputs = MODULES[module]
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    b = torch.randn(outputs, rank, generator=generator) * GAIN / (scaling * rank**0.5)
    return {name_of(module, "A"): a, name_of(module, "B"): b}


def good(modules: Iterable[str] = MODULES, rank: int = RANK, **config: object) -> Draft:
    """An adapter as PEFT writes it, of linear modules only."""
    modules = list(modules)
    scaling = ALPHA / (rank**0.5 if config.get("use_rslora") else rank)
    tensors: dict[str, torch.Tensor] = {}
    for seed, module in enumerate(modules):
        tensors |= pair(module, rank, scaling, seed=seed)
    keys: dict[str, Any] = {
        "base_model_name_or_path": "tiny/llama",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "task_type": "CAUSAL_LM",
    }
    return Draft(keys | config, tensors)


def add_embedding(draft: Draft, rank: int = RANK) -> None:
    """Adapts the embedding too."""
    generator = torch.Generator().manual_seed(40)
    scale = GAIN * rank / (ALPHA * rank**0.5)
    prefix = f"{PREFIX}model.embed_tokens.lora_embedding_"
    draft.tensors[f"{prefix}A"] = torch.randn(rank, VOCABULARY, generator=generator)
    draft.tensors[f"{prefix}B"] = torch.randn(HIDDEN, rank, generator=generator) * scale
    draft.config["target_modules"] = [*draft.config["target_modules"], "embed_tokens"]


def add_head(draft: Draft, rank: int = RANK) -> None:
    """Adapts the output head too."""
    generator = torch.Generator().manual_seed(41)
    scale = GAIN * rank / (ALPHA * rank**0.5)
    a = torch.randn(rank, HIDDEN, generator=generator) / HIDDEN**0.5
    b = torch.randn(VOCABULARY, rank, generator=generator) * scale
    draft.tensors |= {name_of("lm_head", "A"): a, name_of("lm_head", "B"): b}
    draft.config["target_modules"] = [*draft.config["target_modules"], "lm_head"]


def edited(
    tensors: Mapping[str, torch.Tensor | None] | None = None, **config: object
) -> Callable[[Draft], None]:
    """A change of some tensors, where None takes one away, and of some keys."""

    def change(draft: Draft) -> None:
        draft.config |= config
        for name, tensor in (tensors or {}).items():
            if tensor is None:
                del draft.tensors[name]
            else:
                draft.tensors[name] = tensor

    return change


def all_tensors(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **config: object
) -> Callable[[Draft], None]:
    """A change of all tensors, and of some keys."""

    def changed(draft: Draft) -> None:
        draft.config |= config
        draft.tensors = change(draft.tensors)

    return changed


def with_value(name: str, at: tuple[int, ...], value: float) -> Callable[[Draft], None]:
    """A change of one value."""

    def change(draft: Draft) -> None:
        draft.tensors[name][at] = value

    return change


def files(step: Callable[[Path], object]) -> Callable[[Draft], None]:
    """A change of the folder once the files are there."""
    return lambda draft: draft.afterwards.append(step)


def content(name: str, data: bytes) -> Callable[[Draft], None]:
    """A file with this content in place of its own."""
    return files(lambda folder: (folder / name).write_bytes(data))


def resized(name: str, by: int) -> Callable[[Draft], None]:
    """A file of other length, whose end is cut off or zeros."""
    return files(lambda folder: os.truncate(folder / name, (folder / name).stat().st_size + by))
