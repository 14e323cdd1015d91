"""Adapters of experts on CPUs, where vLLM has no kernels for them: answers are PEFT's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..bases.test_compiled_model import compiled_as_on_gpus
from ..engine import (
    BEFORE_0_32,
    answer,
    assert_as_peft,
    generate,
    loras_of,
    prompt_logprobs,
    running_engine,
)
from ..models.cases import Scenario
from ..models.peft_reference import PeftReference
from .expert_adapters import Form, write_one_by_one
from .families import LENGTH, ONE_BY_ONE, RECIPES, SOME, Mixture

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(BEFORE_0_32, reason="vLLM's experts have another interface before 0.32"),
]

BFLOAT16_RMS = 1.2  # without an adapter 0.9: rounding chooses other experts for some tokens
FOUR = pytest.mark.parametrize(
    "model", ["qwen3-moe", "qwen2-moe", "mixtral", "gpt-oss"], indirect=True
)
ONE = pytest.mark.parametrize("model", ["qwen3-moe"], indirect=True)


def test_a_mixed_batch_answers_as_peft_while_slots_change_owners(model: Mixture) -> None:
    """Experts held one by one and as one, adapters of other layers alone, and base rows."""
    with running_engine(model.base, in_process=True, max_loras=2, **model.options) as llm:
        for _ in range(2):
            assert_as_peft(answer(llm, model, model.cases), model.cases)


@FOUR
def test_a_compiled_model_answers_as_peft(model: Mixture) -> None:
    cases = model.cases[:6]
    with (
        compiled_as_on_gpus(),
        running_engine(model.base, in_process=True, max_loras=3, enforce_eager=False) as llm,
    ):
        assert_as_peft(answer(llm, model, cases), cases)


def test_two_workers_answer_as_peft(model: Mixture) -> None:
    with running_engine(model.base, max_loras=3, tensor_parallel_size=2, **model.options) as llm:
        assert_as_peft(answer(llm, model, model.cases), model.cases)


@FOUR
def test_prompts_score_in_bfloat16_as_in_peft_in_float32(model: Mixture) -> None:
    """Weights are packed in words of two numbers there, on processors with AMX."""
    names = {*(recipe.name for recipe in RECIPES), SOME} & model.adapters.keys()
    trained = {name: model.adapters[name] for name in names}
    served = {None, *trained, *(f"{name}{ONE_BY_ONE}" for name in trained)}
    asked = [c for c in model.cases if len(c.prompt) == LENGTH and c.adapter in served]
    reference = PeftReference(model.base, trained)
    with running_engine(model.base, in_process=True, max_loras=2, dtype="bfloat16") as llm:
        prompts = [case.prompt for case in asked]
        outputs = generate(llm, prompts, loras_of(model, asked), max_tokens=1, prompt_logprobs=0)
    of_trained = [case.adapter and case.adapter.removesuffix(ONE_BY_ONE) for case in asked]
    exact = [reference.prompt_logprobs(*one) for one in zip(of_trained, prompts, strict=True)]
    plain = [reference.prompt_logprobs(None, prompt) for prompt in prompts]
    errors = [
        (prompt_logprobs(output) - each).square().mean().sqrt().item()
        for output, each in zip(outputs, exact, strict=True)
    ]
    effects = [(a - b).square().mean().sqrt().item() for a, b in zip(exact, plain, strict=True)]
    assert max(errors) < BFLOAT16_RMS
    for case, effect in zip(asked, effects, strict=True):
        assert case.adapter is None or effect > 2 * BFLOAT16_RMS, "doing nothing would not show"


@ONE
def test_experts_that_the_plugin_does_not_compute_answer_beside_other_adapters(
    model: Mixture,
) -> None:
    """Adapters of them are refused, with what they need."""
    cases = [case for case in model.cases if case.adapter in (None, "dense-only")]
    refused = model.cases_of("experts-r8")
    with running_engine(
        model.base, in_process=True, max_loras=2, enable_moe_shared_loras=True
    ) as llm:
        outputs = answer(llm, model, [*cases, *refused])
    assert_as_peft(outputs[: len(cases)], cases)
    for output in outputs[len(cases) :]:
        assert "no --enable-moe-shared-loras" in str(output.outputs[0].stop_reason)


@pytest.mark.parametrize("model", ["gpt-oss"], indirect=True)
def test_experts_of_gpt_oss_are_refused_where_slots_have_their_gates_apart(model: Mixture) -> None:
    """Gates and what they multiply take turns in its weights."""
    refused = model.cases_of("experts-r8")
    with running_engine(
        model.base, in_process=True, max_loras=2, enable_mixed_moe_lora_format=True
    ) as llm:
        outputs = answer(llm, model, [*model.cases_of("router"), *refused])
    assert_as_peft(outputs[: -len(refused)], model.cases_of("router"))
    for output in outputs[-len(refused) :]:
        assert "no --enable-mixed-moe-lora-format" in str(output.outputs[0].stop_reason)


@pytest.mark.parametrize("model", ["gpt-oss"], indirect=True)
def test_experts_of_gpt_oss_one_by_one_are_refused(model: Mixture, tmp_path: Path) -> None:
    """Neither PEFT nor vLLM has names for them."""
    form = Form("mlp.experts.{expert}.{kind}", ("gate_proj", "up_proj", "down_proj"), 4)
    folder = write_one_by_one(model.adapters["experts-r8"], tmp_path / "single", form)
    cases = [replace(model.cases[0], adapter="single"), *model.cases[1:4]]
    deployed = Scenario(model.base, {**model.adapters, "single": folder}, ())
    with running_engine(model.base, in_process=True, max_loras=2) as llm:
        first, *others = answer(llm, deployed, cases)
    assert "mlp.experts.0." in str(first.outputs[0].stop_reason)
    assert_as_peft(others, cases[1:])


@ONE
def test_magnitudes_of_experts_are_refused(model: Mixture, tmp_path: Path) -> None:
    folder = shutil.copytree(model.adapters[f"experts-r8{ONE_BY_ONE}"], tmp_path / "dora")
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[magnitude] = torch.ones(len(tensors[name]))
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    deployed = Scenario(model.base, {"dora": folder}, ())
    cases = [replace(case, adapter="dora") for case in model.cases[:1]]
    with running_engine(
        model.base,
        in_process=True,
        max_loras=1,
        additional_config={"multilora": {"dora": True}},
    ) as llm:
        [output] = answer(llm, deployed, cases)
    assert "linear layers" in str(output.outputs[0].stop_reason)
