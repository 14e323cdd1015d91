"""Tensor names: what vLLM accepts is accepted, and read the same way."""

from dataclasses import replace

import pytest
from vllm.lora.utils import parse_fine_tuned_lora_name

from vllm_multilora.adapters.model.tensor_names import (
    TensorRole,
    parse_tensor_name,
)

AS_VLLM = [
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    "model.layers.3.mlp.down_proj.lora_B.weight",
    "base_model.model.lm_head.lora_A.weight",
    "base_model.model.model.embed_tokens.lora_embedding_A",
    "model.embed_tokens.lora_embedding_B",
    "base_model.model.model.layers.0.mlp.experts.7.gate_proj.lora_A.weight",
    "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight",
    "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight",
]


@pytest.mark.parametrize("name", AS_VLLM)
def test_lora_tensors_are_read_as_vllm_reads_them(name):
    role = parse_tensor_name(name)
    assert (role.module, role.part == "A") == parse_fine_tuned_lora_name(name)
    assert role.embedding == ("embedding" in name)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("base_model.model.q_proj.lora_A.default.weight", TensorRole("q_proj", "A")),
        ("model.q_proj.lora_B.my-adapter.weight", TensorRole("model.q_proj", "B")),
        ("base_model.model.embed.lora_embedding_A.default", TensorRole("embed", "A", True)),
        ("base_model.model.q_proj.lora_magnitude_vector", TensorRole("q_proj", "magnitude")),
        ("q_proj.lora_magnitude_vector.weight", TensorRole("q_proj", "magnitude")),
        ("q_proj.lora_magnitude_vector.my-adapter", TensorRole("q_proj", "magnitude")),
        ("a.q_proj.lora_magnitude_vector.default.weight", TensorRole("a.q_proj", "magnitude")),
    ],
)
def test_the_adapters_name_in_peft_may_stand_in_between(name, role):
    assert parse_tensor_name(name) == role


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model._orig_mod.model.layers.0.q_proj.lora_A.weight",
        "_orig_mod.base_model.model.model.layers.0.q_proj.lora_A.weight",
        "module.base_model.model.model.layers.0.q_proj.lora_A.default.weight",
        "base_model.model.module.model.layers.0.q_proj.lora_A.weight",
        "_fsdp_wrapped_module.base_model.model.model.layers.0._fsdp_wrapped_module."
        "_checkpoint_wrapped_module.q_proj.lora_A.weight",
    ],
)
def test_what_is_wrapped_for_training_has_its_own_name(name):
    assert parse_tensor_name(name) == TensorRole("model.layers.0.q_proj", "A")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.old.lm_head.lora_A.default.weight",
        "old.lm_head.lora_B.weight",
        "base_model.model.embed_tokens.lora_embedding_B.default",
    ],
)
def test_vllm_reads_what_it_is_given_for_them(name):
    role = parse_tensor_name(name)
    given = role.of("model.lm_head")
    assert parse_tensor_name(given) == replace(role, module="model.lm_head")
    assert parse_fine_tuned_lora_name(given) == ("model.lm_head", role.part == "A")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lora_A.weight",
        "lora_embedding_A",
        "base_model.model.score.weight",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "lora_magnitude_vector",
        "base_model.model.q_proj.lora_magnitude_vector.default.bias",
        "base_model.model.q_proj.lora_A.bias",
        "base_model.model.q_proj.lora_A",
        "base_model.model.q_proj.weight",
    ],
)
def test_other_tensors_are_no_lora_tensors(name):
    assert parse_tensor_name(name) is None
