"""Small random models of mixtures of experts, and adapters of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..models.cases import Scenario
from ..models.recipes import AdapterRecipe
from ..models.scenarios import build_scenario
from ..models.tiny_models import (
    write_deepseek_moe,
    write_glm4_moe,
    write_gpt_oss,
    write_mixtral,
    write_qwen2_moe,
    write_qwen3_moe,
)
from .expert_adapters import BOTH, Form, some_experts, write_one_by_one, write_with_zeros

ONE_BY_ONE = "-one-by-one"
"""At the end of the names of adapters that hold experts one by one."""

SOME = "some-experts"
LENGTH = 23
"""Tokens of the longer prompts."""

RECIPES = (
    AdapterRecipe("experts-r8", (), parameters=BOTH, gain=0.8),
    AdapterRecipe("experts-r3", ("q_proj", "o_proj"), rank=3, parameters=BOTH, gain=0.8),
    AdapterRecipe("dense-only", ("o_proj",), gain=1.0),
    AdapterRecipe(
        "patterns",
        ("o_proj",),
        rank=4,
        rank_pattern={"experts.down_proj": 16},
        alpha_pattern={"mlp.experts.gate_up_proj": 5},
        parameters=BOTH,
        gain=0.7,
    ),
)


@dataclass(frozen=True)
class Family:
    """A model and what is special about its mixtures.

    Attributes:
        write: Writes the model.
        form: How adapters name its experts one by one; None if vLLM has them only as one.
        experts: How many each layer has.
        router: PEFT's name for the router's weight.
        shared: Linear layers of the expert that all tokens share.
        options: What vLLM needs to compute the model in float32 on CPUs.
    """

    write: Callable[[Path], Path]
    form: Form | None
    experts: int = 8
    router: str = "mlp.gate.weight"
    shared: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def recipes(self) -> tuple[AdapterRecipe, ...]:
        """Adapters of experts, of the router and of the shared expert, alone and together."""
        routers = (
            AdapterRecipe("router", (), rank=5, parameters=(self.router,), gain=1.0),
            AdapterRecipe(
                "router-beside-experts",
                ("o_proj",),
                rank=6,
                parameters=(self.router, *BOTH),
                gain=0.7,
            ),
        )
        of_shared = (
            AdapterRecipe("shared", self.shared, gain=1.0),
            AdapterRecipe("shared-beside-experts", self.shared, 5, parameters=BOTH, gain=0.8),
        )
        return (*RECIPES, *routers, *(of_shared if self.shared else ()))


_KINDS = ("gate_proj", "up_proj", "down_proj")
_BY_KIND = Form("mlp.experts.{expert}.{kind}", _KINDS, 8)
_SHARED = tuple(f"shared_experts.{kind}" for kind in _KINDS)

FAMILIES = {
    "qwen3-moe": Family(write_qwen3_moe, _BY_KIND),
    "qwen2-moe": Family(
        write_qwen2_moe,
        replace(_BY_KIND, experts=4),
        experts=4,
        shared=(*(f"shared_expert.{kind}" for kind in _KINDS), "shared_expert_gate"),
    ),
    "mixtral": Family(
        write_mixtral,
        Form("block_sparse_moe.experts.{expert}.{kind}", ("w1", "w3", "w2"), 4),
        experts=4,
    ),
    "deepseek-v3": Family(
        write_deepseek_moe,
        _BY_KIND,
        shared=_SHARED,
        options={"attention_backend": "CPU_MLA"},  # vLLM's with AMX is for bfloat16 only
    ),
    "glm4-moe": Family(write_glm4_moe, _BY_KIND, shared=_SHARED),
    "gpt-oss": Family(write_gpt_oss, None, experts=4, router="mlp.router.weight"),
}


@dataclass(frozen=True)
class Mixture(Scenario):
    """A family's model with its adapters, and what an engine of it is started with."""

    options: Mapping[str, Any]


def family_scenario(name: str, folder: Path) -> Mixture:
    """A family's model with its adapters; some of experts are there in both forms."""
    family = FAMILIES[name]

    def some_experts_of(adapters: Mapping[str, Path]) -> dict[str, Path]:
        if family.form is None:
            return {}
        source = adapters["experts-r8"]
        return {SOME: write_with_zeros(source, folder / SOME, family.experts, some_experts)}

    found = build_scenario(
        folder, family.write, family.recipes(), lengths=(7, LENGTH), derive=some_experts_of
    )
    adapters, cases = dict(found.adapters), list(found.cases)
    several = (("experts-r8", None), ("patterns", None), (SOME, some_experts))
    for adapter, ranks in several if family.form is not None else ():
        one_by_one = f"{adapter}{ONE_BY_ONE}"
        adapters[one_by_one] = write_one_by_one(
            adapters[adapter], folder / one_by_one, family.form, ranks
        )
        cases += [replace(case, adapter=one_by_one) for case in found.cases_of(adapter)]
    return Mixture(found.base, adapters, tuple(cases), family.options)
