"""Modules that a configuration leaves out: those that PEFT's own matching leaves out."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from vllm_multilora.adapters.config.target_modules import Targets

from ..checkpoints import config_of

KINDS = ("q_proj", "k_proj", "lm_head")
WHOLE = [f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1, 11) for kind in KINDS[:2]]
MODULES = [*WHOLE, "layers.0.q_proj", "model.layers.1.experts.0.q_proj", "embed_tokens", "lm_head"]
NAMES = st.lists(st.sampled_from([*KINDS, "embed_tokens", "late"]), min_size=1, unique=True)


def targets(**keys: object) -> Targets:
    content = {"r": 8, "lora_alpha": 8} | keys
    return Targets(config_of(json.dumps(content)))


def peft_adapts(module: str, **keys: object) -> bool:
    return bool(check_target_module_exists(LoraConfig(**keys), module))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    named=NAMES,
    layers=st.none() | st.sampled_from([0, 1, [0, 11], [], [5]]),
    pattern=st.sampled_from([None, "layers", ["layers"], []]),
    excluded=st.none() | st.lists(st.sampled_from([*KINDS, "self_attn.q_proj", *WHOLE, "proj"])),
)
def test_lists_of_names_leave_out_what_peft_leaves_out(named, layers, pattern, excluded):
    keys = {"target_modules": named, "exclude_modules": excluded}
    if layers is not None:
        keys |= {"layers_to_transform": layers, "layers_pattern": pattern}
    found = targets(**keys)
    for module in MODULES:
        assert (found.leaves_out(module) is None) == peft_adapts(module, **keys), module


@settings(max_examples=200, deadline=None, derandomize=True)
@given(named=st.lists(st.sampled_from([*KINDS, *WHOLE, "1.self_attn.k_proj", "k"]), min_size=1))
def test_lists_of_whole_names_leave_out_what_peft_leaves_out(named):
    keys = {"target_modules": named, "layers_to_transform": [0]}
    found = targets(**keys)
    for module in MODULES:
        assert (found.leaves_out(module) is None) == peft_adapts(module, **keys), module


@pytest.mark.parametrize("start", ["base_model.model.", "module.model.", "language_model."])
def test_whole_names_may_begin_otherwise(start):
    names = (f"{start}layers.1._fsdp_wrapped_module.self_attn.q_proj", f"{start}embed_tokens")
    found = targets(target_modules=list(names))
    named = [module for module in MODULES if found.leaves_out(module) is None]
    assert named == ["model.layers.1.self_attn.q_proj", "embed_tokens"]


@pytest.mark.parametrize("excluded", [None, ".*k_proj", r"model\.layers\.1\..*", "k_proj|lm_head"])
@pytest.mark.parametrize(
    "named", [r".*\.q_proj", r".*layers\.(0|11)\..*", "lm_head|.*self_attn.*", "q_proj", "(?!l).*"]
)
def test_expressions_leave_out_what_peft_leaves_out(named, excluded):
    keys = {"target_modules": named, "exclude_modules": excluded}
    found = targets(**keys)
    for module in MODULES:
        assert (found.leaves_out(module) is None) == peft_adapts(module, **keys), module


@pytest.mark.parametrize("named", ["all-linear", "(.*q)*" + r"\.v_proj", ".*.*.*.*.*v_proj", None])
def test_what_names_no_modules_or_could_take_long_leaves_none_out(named):
    found = targets(target_modules=named, exclude_modules="(.*q)*.*proj")
    assert [found.leaves_out(module) for module in MODULES] == [None] * len(MODULES)


def test_parameters_are_adapted_whatever_modules_are():
    keys = {"target_parameters": ["mlp.gate.weight", "gate_up_proj", "down_proj"]}
    found = targets(target_modules=[], exclude_modules=["gate"], **keys)
    for module in ("experts", "experts.base_layer", "gate"):
        assert found.leaves_out(f"model.layers.0.mlp.{module}") is None
    assert found.leaves_out("model.layers.0.block.gate") == "target_modules"


def test_a_tied_head_is_not_among_the_names_that_peft_saves():
    for tied, key in ((False, "target_modules"), (True, None)):
        found = targets(target_modules=["model.embed_tokens"], ensure_weight_tying=tied)
        assert found.leaves_out("lm_head") == key
        assert found.leaves_out(WHOLE[0]) == "target_modules"
