"""Writes a recipe as an adapter checkpoint, by PEFT itself and in PEFT's own file layout."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from .recipes import AdapterRecipe


def write_adapters(
    base: Path, root: Path, recipes: Iterable[AdapterRecipe], *, auto: Any = AutoModelForCausalLM
) -> dict[str, Path]:
    """Writes an adapter of each recipe below ``root``, with seeds from 0; by the recipes' names."""
    return {
        recipe.name: write_adapter(base, root / recipe.name, recipe, seed=seed, auto=auto)
        for seed, recipe in enumerate(recipes)
    }


def write_adapter(
    base: Path, path: Path, recipe: AdapterRecipe, *, seed: int, auto: Any = AutoModelForCausalLM
) -> Path:
    """Writes an adapter for the base checkpoint in ``base``, with non-zero A and B.

    Args:
        base: Directory of the base checkpoint.
        path: Directory to write ``adapter_config.json`` and ``adapter_model.safetensors`` into.
        recipe: The adapter's shape.
        seed: Seeds the weights.
        auto: The class of Transformers' that loads the base checkpoint.

    Returns:
        ``path``.
    """
    task = "CAUSAL_LM" if auto is AutoModelForCausalLM else None
    targets: list[str] | str = list(recipe.targets)
    if recipe.within:
        targets = rf".*\b{re.escape(recipe.within)}\..*\b({'|'.join(recipe.targets)})"
    head = "TOKEN_CLS" if auto is AutoModelForTokenClassification else "SEQ_CLS"
    config = LoraConfig(
        task_type=head if recipe.own_head else task,
        target_modules=targets,
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        layers_to_transform=list(recipe.layers) if recipe.layers is not None else None,
        alora_invocation_tokens=list(recipe.invocation) or None,
        use_dora=recipe.dora,
        target_parameters=list(recipe.parameters) or None,
    )
    model = get_peft_model(auto.from_pretrained(base, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    for _, module in sorted(model.named_modules(), key=lambda item: item[0]):
        if isinstance(module, ParamWrapper):
            _randomise_parameter(module, recipe.gain, generator)
        elif isinstance(module, LoraLayer):
            _randomise(module, recipe.gain, generator)
            if recipe.bfloat16:
                for part in (module.lora_A, module.lora_B):
                    weight = part["default"].weight
                    weight.data.copy_(weight.data.bfloat16())
        elif isinstance(module, ModulesToSaveWrapper):
            for part in module.modules_to_save["default"].parameters():
                part.data.copy_(torch.randn(part.shape, generator=generator) * part.std())
    model.save_pretrained(path)
    return path


def _randomise_parameter(module: ParamWrapper, gain: float, generator: torch.Generator) -> None:
    """The same for a parameter of all experts of a layer, of each of them."""
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    a.data.copy_(torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5)
    b.data.copy_(torch.randn(b.shape, generator=generator))
    size = module.get_delta_weight("default").std()
    b.data.mul_(gain * module.get_param().std() / size)


def _randomise(layer: LoraLayer, gain: float, generator: torch.Generator) -> None:
    """Fills A and B so that the scaled delta has ``gain`` times the size of the layer's output."""
    weight = layer.get_base_layer().weight
    if layer.lora_embedding_A:
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        fan_in = 1
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        fan_in = weight.shape[1]
    output_std = weight.std().item() * fan_in**0.5
    b_std = gain * output_std / (layer.scaling["default"] * a.shape[0] ** 0.5)
    a.data.copy_(torch.randn(a.shape, generator=generator) / fan_in**0.5)
    b.data.copy_(torch.randn(b.shape, generator=generator) * b_std)
    if layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data.mul_(0.5 + torch.rand(magnitude.shape, generator=generator))
