"""Adapters that PEFT has trained of experts, in the other forms that files have.

PEFT's A of experts that are held as one has one expert's ranks after the other's, and its B has all
experts' columns of one rank after those of the other.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""PEFT's `target_parameters` of all experts."""

GATE, UP, DOWN = range(3)
Ranks = Callable[[int, int, int], int]
"""The rank of a layer's expert's projection, `GATE`, `UP` or `DOWN`; 0 if it is not adapted."""


@dataclass(frozen=True)
class Form:
    """How adapters name a model's experts one by one.

    Attributes:
        pattern: Of an expert's projection, below its layer.
        kinds: The projections: gate, up and down.
        experts: How many a layer has.
    """

    pattern: str
    kinds: tuple[str, str, str]
    experts: int


def some_experts(layer: int, expert: int, kind: int) -> int:
    """Ranks of up to 8 of some experts: of the second layer one, of the first some in part."""
    if layer == 1:
        return 8 if expert == 1 else 0
    return ((8, 8, 8), (0, 0, 0), (3, 5, 2), (0, 0, 4))[expert % 4][kind]


def write_with_zeros(source: Path, folder: Path, experts: int, ranks: Ranks) -> Path:
    """Copies an adapter of experts held as one, with zeros past some ranks."""
    shutil.copytree(source, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        layer, is_outer, matrix = _parts(name)
        if matrix != "B":
            continue
        by_rank = tensor.view(len(tensor), -1, experts)
        for expert in range(experts):
            halves = by_rank[..., expert].chunk(2) if is_outer else [by_rank[..., expert]]
            for kind, part in zip((GATE, UP) if is_outer else (DOWN,), halves, strict=True):
                part[:, ranks(layer, expert, kind) :] = 0
    save_file(tensors, file)
    return folder


def write_one_by_one(source: Path, folder: Path, form: Form, ranks: Ranks | None = None) -> Path:
    """Writes an adapter of all experts of a layer as one of each expert, as was usual before.

    Args:
        source: The adapter, with one rank for all experts if `ranks` says others.
        folder: Where to write the new one.
        form: How the model's experts are named.
        ranks: What the new one has of each; None: all.
    """
    tensors: dict[str, torch.Tensor] = {}
    config = json.loads((source / "adapter_config.json").read_text())
    own_ranks, own_alphas = {}, {}
    for name, tensor in load_file(source / "adapter_model.safetensors").items():
        layer, is_outer, matrix = _parts(name)
        if not matrix:
            tensors[name] = tensor
            continue
        for expert in range(form.experts):
            rank = tensor.shape["AB".index(matrix)] // form.experts
            if matrix == "A":
                own = tensor[expert * rank : (expert + 1) * rank]
            else:
                own = tensor.reshape(len(tensor), rank, form.experts)[..., expert]
            halves = [own] if not is_outer else [own, own] if matrix == "A" else own.chunk(2)
            for kind, part in zip((GATE, UP) if is_outer else (DOWN,), halves, strict=True):
                kept = rank if ranks is None else ranks(layer, expert, kind)
                module = form.pattern.format(expert=expert, kind=form.kinds[kind])
                if kept:
                    full = f"{name.partition('mlp.experts.')[0]}{module}.lora_{matrix}.weight"
                    kept_part = part[:kept] if matrix == "A" else part[:, :kept]
                    tensors[full] = kept_part.clone().contiguous()  # not one memory
                if ranks is not None and kept:
                    of_layer = f"layers.{layer}.{module}"
                    own_ranks[of_layer] = kept
                    own_alphas[of_layer] = config["lora_alpha"] * kept / rank
    if ranks is None:
        for kind in form.kinds:
            of_kind = rf".*experts\.\d+\.{kind}"
            if kind == form.kinds[DOWN] and "experts.down_proj" in config["rank_pattern"]:
                own_ranks[of_kind] = config["rank_pattern"]["experts.down_proj"]
            if kind != form.kinds[DOWN] and BOTH[0] in config["alpha_pattern"]:
                own_alphas[of_kind] = config["alpha_pattern"][BOTH[0]]
    config |= {"rank_pattern": own_ranks, "alpha_pattern": own_alphas, "target_parameters": None}
    config["target_modules"] = [*(config["target_modules"] or ()), *form.kinds]
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _parts(name: str) -> tuple[int, bool, str]:
    """A tensor's layer, whether it is of gates and ups, and `A` or `B`; empty if not of experts."""
    before, of_experts, rest = name.partition("mlp.experts.")
    if not of_experts:
        return 0, False, ""
    found = re.search(r"layers\.(\d+)\.", before)
    assert found is not None
    return int(found[1]), rest.startswith("base_layer."), rest.split(".")[-2][-1]
