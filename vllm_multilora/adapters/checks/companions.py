"""Modules that are adapted together or not at all."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.model.tensor_names import (
    FUSED_EXPERTS,
    WRAPPED,
    WRAPPED_EXPERTS,
    FoundModule,
)
from vllm_multilora.adapters.problems import Code, ProblemList, shown_name

_OF_EXPERTS = f"{FUSED_EXPERTS}."


def require_companions(
    modules: Mapping[str, FoundModule],
    config: AdapterConfig | None,
    layout: ModelLayout,
    problems: ProblemList,
) -> None:
    """Notes modules without others that have to be adapted with them."""
    for name, found in modules.items():
        if name.endswith(WRAPPED_EXPERTS):
            _require_parameter(name.removesuffix(WRAPPED), found, modules, problems)
        elif name.endswith(FUSED_EXPERTS) and layout.is_special(name):
            _require_parameter(f"{name}{WRAPPED}", found, modules, problems)
    _require_experts(modules, layout, problems)
    _require_whole_or_parts(modules, layout, problems)
    if layout.tied and config is not None and config.raw.get("ensure_weight_tying"):
        _require_tied(modules, layout, problems)


def _require_parameter(
    other: str, found: FoundModule, modules: Mapping[str, FoundModule], problems: ProblemList
) -> None:
    """Experts that are held as one have two parameters, which vLLM adapts together.

    PEFT gives the tensors of a single one the same names, whichever of the two it is.
    """
    if other not in modules:
        problems.add(
            Code.HALF_MISSING,
            found.first_tensor,
            "of one parameter of experts that are held as one",
            f"both of them adapted, '{found.outer}' and 'down_proj'",
            hint="train with both in 'target_parameters'",
        )


def _require_experts(
    modules: Mapping[str, FoundModule], layout: ModelLayout, problems: ProblemList
) -> None:
    """Reports layers of which only some experts are adapted, if their sizes are not known."""
    adapted = {
        name.partition(_OF_EXPERTS)[0]: found
        for name, found in modules.items()
        if _OF_EXPERTS in name and name in layout.special
    }
    for layer, found in adapted.items():
        if f"{layer}{FUSED_EXPERTS}" in modules:
            problems.add(
                Code.DUPLICATE_TENSOR,
                found.first_tensor,
                f"of one of the experts of {shown_name(layer)}, beside tensors of all of them",
                "experts held as one, or one by one",
                cause="experts",
            )
    for name in sorted(layout.special) if adapted else ():
        layer, of_experts, _ = name.partition(_OF_EXPERTS)
        if name in layout.linear_shapes:
            continue
        if of_experts and layer in adapted and name not in modules:
            problems.add(
                Code.HALF_MISSING,
                adapted[layer].first_tensor,
                f"of experts of which {shown_name(name)} is not adapted",
                "all projections of all experts of a layer, or none",
                hint="train with all of them in 'target_modules'",
                cause="experts",
            )


def _require_whole_or_parts(
    modules: Mapping[str, FoundModule], layout: ModelLayout, problems: ProblemList
) -> None:
    for whole, parts in layout.merged.items() if modules.keys() & layout.merged.keys() else ():
        for part in parts if whole in modules else ():
            if part in modules:
                problems.add(
                    Code.DUPLICATE_TENSOR,
                    modules[part].first_tensor,
                    f"of a part of {shown_name(whole)}, which is adapted as a whole, too",
                    "one of them",
                    cause="parts",
                )


def _require_tied(
    modules: Mapping[str, FoundModule], layout: ModelLayout, problems: ProblemList
) -> None:
    """An embedding and a head of the same weights have the same adapter, if PEFT is told so."""
    shapes = layout.special_shapes
    found = {shapes[name].embedding: of for name, of in modules.items() if name in shapes}
    if len(found) == 1:
        [(is_embedding, module)] = found.items()
        kinds = ("the embedding", "the output head")
        kind, other = kinds if is_embedding else kinds[::-1]
        problems.add(
            Code.HALF_MISSING,
            module.first_tensor,
            f"of {kind} alone, with 'ensure_weight_tying' in adapter_config.json",
            f"tensors of {other}, too, to which PEFT applies the same",
            hint="save the adapter again",
        )
