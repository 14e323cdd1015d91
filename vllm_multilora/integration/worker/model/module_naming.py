"""Reads from a running model how module names in its adapters' checkpoints are mapped."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer

from vllm_multilora.adapters.model.naming import ModuleNaming, Renames, Replacement, SourceRename
from vllm_multilora.adapters.model.tensor_names import HEADS

if TYPE_CHECKING:
    from vllm.lora.model_manager import LoRAModelManager

logger = logging.getLogger(__name__)

_READ = frozenset(f"orig_to_new_{kind}" for kind in ("renaming", "regex", "substr", "prefix"))
_READ |= {"orig_to_new_suffix", "orig_to_new_stacked"}  # the last is empty in a rename mapper
# Parts of names, and what Transformers has had in their place since its version 5: of the towers of
# CLIP and SigLIP; of experts and their routers in Mixtral and models like it; of Granite's routers,
# where the last is the older name; of AFMoE's routers in any version; of experts that all tokens
# share (Laguna, HY); and of language models within others, the last where `model.` is cut off.
_LATER = (
    (".vision_model.", "."),
    (".block_sparse_moe.", ".mlp."),
    (".block_sparse_moe.gate.", ".mlp.router."),
    (".block_sparse_moe.gate.", ".block_sparse_moe.router."),
    (".block_sparse_moe.gate.", ".block_sparse_moe.router.layer."),
    (".mlp.gate.", ".mlp.router.gate."),
    (".mlp.shared_expert.", ".mlp.shared_experts."),
    (".mlp.shared_mlp.", ".mlp.shared_experts."),
    ("language_model.model.", "model.language_model."),
    ("language_model.model.", "language_model."),
)
# Flags that have the same meaning and value in Python's `re` and in `regex`, which vLLM uses.
_FLAGS = int(re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE)


def module_naming(
    manager: LoRAModelManager, names: frozenset[str], refused: Iterable[str] = ()
) -> ModuleNaming:
    """What becomes of module names in a manager's model."""
    model: Any = manager.model
    targets = manager.lora_config.target_modules
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    known = names.union(refused)
    packed = {kind: tuple(parts) for kind, parts in manager.packed_modules_mapping.items()}
    unwrapped = frozenset(name for name in unwrapped_layers(manager) if _is_left_out(manager, name))
    if manager.supports_mm:
        towers = tuple(f"{name.rstrip('.')}." for name in manager.mm_mapping.tower_model)
        unwrapped |= frozenset(_unneeded_layers(model, towers, known | unwrapped))
        # Where Transformers may have had the towers since.
        unwrapped |= {f"model.{name}" for name in unwrapped}
    return ModuleNaming(
        names=names,
        renames=renames_of(mapper.get_rename_mapper()) if mapper is not None else None,
        text_names=_text_names(manager, known) | _later_names(known),
        skipped=tuple(getattr(model, "lora_skip_prefixes", None) or ()),
        others=tuple(
            f"{name}." for name, part in model.named_modules() if isinstance(part, PPMissingLayer)
        ),
        roots=frozenset(name for name, _ in model.named_children()),
        pooling=bool(manager.is_pooling_model),
        targets=tuple(targets) if targets is not None else None,
        packed=packed,
        unwrapped=(unwrapped | _later_names(unwrapped).keys()) - names,
        unloaded=tuple(_unloaded(model, pools=bool(manager.is_pooling_model))),
    )


def renames_of(mapper: Any) -> Renames:
    """The renames of a `WeightsMapper` as data; what cannot be told as data is logged."""
    left_out: list[str] = []
    found = Renames(
        sources=tuple(_sources(mapper.orig_to_new_renaming, left_out)),
        expressions=tuple(_expressions(mapper.orig_to_new_regex, left_out)),
        substrings=_pairs(mapper.orig_to_new_substr),
        prefixes=_pairs(mapper.orig_to_new_prefix),
        suffixes=_pairs(mapper.orig_to_new_suffix),
    )
    others = (f.name for f in fields(mapper) if f.name not in _READ)
    left_out += [name for name in others if getattr(mapper, name)]
    if left_out:
        logger.warning(
            "Adapters' names of modules are not read as vLLM reads them for this model: %s cannot "
            "be told to the processes that check adapters. Adapters that need it are refused.",
            ", ".join(left_out),
        )
    return found


def _sources(renamings: Iterable[Any], left_out: list[str]) -> Iterator[SourceRename]:
    for renaming in renamings:
        # A class of its own way of renaming may also keep state from name to name.
        of_class = getattr(type(renaming), "rename_source_key", None)
        plain = getattr(of_class, "__qualname__", "").startswith("WeightTransform.")
        compiled = getattr(renaming, "compiled_sources", None)
        if not plain or compiled is None:
            left_out.append(f"Transformers' {renaming!r}")
            continue
        scope, base = renaming.scope_prefix, renaming.base_model_prefix
        scopes = None
        if scope is not None:
            scope, base = (f"{text}." if text else "" for text in (scope, base))
            scopes = (base + scope, scope)
        yield SourceRename(compiled.pattern, renaming.target_patterns[0], scopes)


def _expressions(of: Mapping[Any, str], left_out: list[str]) -> Iterator[Replacement]:
    for pattern, new in of.items():
        found = Replacement(pattern.pattern, new, pattern.flags & _FLAGS)
        try:
            re.compile(found.old, found.flags)
        except re.error:  # what only the package `regex` understands
            left_out.append(f"the regular expression {found.old!r}")
        else:
            yield found


def _pairs(of: Mapping[str, str]) -> tuple[Replacement, ...]:
    return tuple(Replacement(old, new) for old, new in of.items())


def _text_names(manager: LoRAModelManager, names: Iterable[str]) -> dict[str, str]:
    """What adapters of the text-only model call a multimodal model's modules.

    From 0.33 on vLLM knows them, too: its `_get_text_lora_names`.
    """
    if not manager.supports_mm:
        return {}
    start = manager.mm_mapping.language_model[0].rstrip(".") + "."
    found = {}
    for name in sorted(names):
        inner = name.removeprefix(start)
        if inner != name:
            found[inner] = name
            if not inner.startswith(("model.", "lm_head")):  # a model without a head of its own
                found[f"model.{inner}"] = name
    return found


def _later_names(names: Iterable[str]) -> dict[str, str]:
    """What Transformers has called modules since its version 5, where vLLM has the older names."""
    return {
        f"{name}.".replace(old, new, 1).removesuffix("."): name
        for old, new in _LATER
        for name in sorted(names)
        if old in f"{name}."
    }


def refused_layers(manager: LoRAModelManager) -> Iterator[str]:
    """Linear layers that vLLM does not adapt, and without which no adapter of them is served."""
    return (name for name in unwrapped_layers(manager) if not _is_left_out(manager, name))


def unwrapped_layers(manager: LoRAModelManager) -> Iterator[str]:
    """Linear layers that vLLM has not wrapped, also by the names of what it has fused in them."""
    model: Any = manager.model
    wrapped = {
        name
        for name, part in model.named_modules(remove_duplicate=False)
        if isinstance(part, BaseLayerWithLoRA)
    }
    stacked = _stacked(model)
    for name, part in model.named_modules(remove_duplicate=False):
        parent, _, kind = name.rpartition(".")
        if not isinstance(part, LinearBase | torch.nn.Linear) or _is_below(name, wrapped):
            continue
        yield name
        fused = manager.packed_modules_mapping.get(kind, ())
        yield from (f"{parent}.{of}" if parent else of for of in fused)
        yield from (
            f".{name}.".replace(new, old)[1:-1] for old, new in stacked if new in f".{name}."
        )


def _stacked(model: torch.nn.Module) -> set[tuple[str, str]]:
    """Parts of names, dots around them, and of the fused modules that parts of a model load into.

    A tower may fuse what the language model beside it has as one in the checkpoint, too.
    """
    mappers = (getattr(part, "hf_to_vllm_mapper", None) for part in model.modules())
    return {
        (f"{old.rstrip('.')}.", f"{new[0].rstrip('.')}.")
        for mapper in mappers
        for old, new in (getattr(mapper, "orig_to_new_stacked", None) or {}).items()
    }


def _is_left_out(manager: LoRAModelManager, name: str) -> bool:
    """Whether adapters are served without a layer: one of a part that is not adapted, as a tower.

    A head for classes is never left out, because it decides every answer.
    """
    return not set(HEADS) & set(name.split(".")) and manager._get_punica_wrapper(name) is None


def _unneeded_layers(
    model: torch.nn.Module, towers: tuple[str, ...], known: Collection[str]
) -> Iterator[str]:
    """Modules of a tower's last layers, which vLLM leaves out where others' states are handed on.

    Adapters have them: Transformers computes these layers, and what they make goes nowhere.

    Args:
        model: The model.
        towers: How the names of its towers' modules begin.
        known: Modules that it has; those of the last layer that is there stand for the rest.
    """
    counts: dict[str, int] = {}  # layers by the configuration that is nearest
    for block, part in model.named_modules():
        own = getattr(getattr(part, "config", None), "num_hidden_layers", None)
        counts[block] = own if own is not None else counts.get(block.rpartition(".")[0], 0)
        layers = getattr(part, "layers", None) if f"{block}.".startswith(towers) else None
        if not isinstance(layers, torch.nn.ModuleList) or not 0 < len(layers) < counts[block]:
            continue
        last = f"{block}.layers.{len(layers) - 1}."
        for number in range(len(layers), counts[block]):
            for name in known:
                if name.startswith(last):
                    yield f"{block}.layers.{number}.{name.removeprefix(last)}"


def _unloaded(model: torch.nn.Module, *, pools: bool) -> Iterator[str]:
    """Beginnings of the modules that vLLM leaves in the checkpoint, as a task has no use for them.

    Where there are classes, a head for tokens does have: vLLM makes some models' of its rows.
    """
    parts = dict(model.named_modules())
    classifies = any(name.rpartition(".")[2] in HEADS for name in parts)
    for name, part in parts.items():
        if isinstance(part, StageMissingLayer):
            if part.stage_name != "output" or not classifies:
                yield f"{name}."
        elif name and pools and not classifies:
            mapper = getattr(part, "hf_to_vllm_mapper", None)
            prefixes = getattr(mapper, "orig_to_new_prefix", None) or {}
            yield from (f"{name}.{prefix}" for prefix, new in prefixes.items() if new is None)


def _is_below(name: str, modules: set[str]) -> bool:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return bool(name)
