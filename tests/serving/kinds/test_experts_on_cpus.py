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
from ..models.recipes import AdapterRecipe
from ..models.scenarios import build_scenario
from ..models.tiny_models import write_mixtral, write_qwen2_moe, write_qwen3_moe

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(BEFORE_0_32, reason="vLLM's experts have another interface before 0.32"),
]

BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
RECIPES = (
    AdapterRecipe("experts-r8", (), parameters=BOTH, gain=0.8),
    AdapterRecipe("experts-r3", ("q_proj", "v_proj"), rank=3, parameters=BOTH, gain=0.8),
    AdapterRecipe("dense-only", ("q_proj", "v_proj"), gain=1.0),
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
SHARED_EXPERT = AdapterRecipe("shared", ("q_proj", "shared_expert.down_proj"), gain=1.0)
QWEN3 = "mlp.experts.{expert}.{kind}", ("gate_proj", "up_proj", "down_proj")
MIXTRAL = "block_sparse_moe.experts.{expert}.{kind}", ("w1", "w3", "w2")
ONE_BY_ONE = "-one-by-one"
LENGTH = 23
"""Tokens of the longer prompts."""
BFLOAT16_RMS = 1.2  # without an adapter 0.9: rounding chooses other experts for some tokens
Form = tuple[str, tuple[str, str, str]]


@pytest.fixture(autouse=True)
def groups_of_experts() -> None:
    """An engine in this process makes its groups of workers anew.

    An earlier engine has left its own, and experts need one more than other models.
    """
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module", params=["qwen3-moe", "qwen2-moe", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """A base model; each adapter that PEFT has trained of experts is there in both forms."""
    write, form, experts = {
        "qwen3-moe": (write_qwen3_moe, QWEN3, 8),
        "qwen2-moe": (write_qwen2_moe, QWEN3, 4),  # has an expert that all tokens share
        "mixtral": (write_mixtral, MIXTRAL, 4),
    }[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    shared = [SHARED_EXPERT] if write is write_qwen2_moe else []
    found = build_scenario(folder, write, [*RECIPES, *shared], lengths=(7, LENGTH))
    adapters = dict(found.adapters)
    cases = list(found.cases)
    for name in ("experts-r8", "patterns"):
        one_by_one = f"{name}{ONE_BY_ONE}"
        adapters[one_by_one] = write_one_by_one(
            found.adapters[name], folder / one_by_one, form, experts
        )
        cases += [replace(case, adapter=one_by_one) for case in found.cases_of(name)]
    return Scenario(found.base, adapters, tuple(cases))


def write_one_by_one(source: Path, folder: Path, form: Form, experts: int) -> Path:
    """Writes an adapter of all experts of a layer as one of each expert, as was usual before.

    PEFT's A of experts that are held as one has one expert's ranks after the other's, and its B has
    all experts' columns of one rank after those of the other.
    """
    pattern, kinds = form
    tensors: dict[str, torch.Tensor] = {}
    ranks, alphas = {}, {}
    config = json.loads((source / "adapter_config.json").read_text())
    for name, tensor in load_file(source / "adapter_model.safetensors").items():
        layer, of_experts, rest = name.partition("mlp.experts.")
        if not of_experts:
            tensors[name] = tensor
            continue
        is_outer, matrix = rest.startswith("base_layer."), rest.split(".")[-2][-1]
        for expert in range(experts):
            rank = len(tensor) // experts if matrix == "A" else tensor.shape[1] // experts
            if matrix == "A":
                own = tensor[expert * rank : (expert + 1) * rank]
            else:
                own = tensor.reshape(len(tensor), rank, experts)[..., expert]
            halves = list(own.chunk(2)) if matrix == "B" else [own, own]
            for kind, part in (
                zip(kinds[:2], halves, strict=True) if is_outer else [(kinds[2], own)]
            ):
                module = f"{layer}{pattern.format(expert=expert, kind=kind)}"
                tensors[f"{module}.lora_{matrix}.weight"] = part.clone()  # not one memory
    of_down = "experts.down_proj" in config["rank_pattern"]
    for kind in kinds:
        if of_down and kind == kinds[2]:
            ranks[rf".*experts\.\d+\.{kind}"] = config["rank_pattern"]["experts.down_proj"]
        if config["alpha_pattern"] and kind != kinds[2]:
            alphas[rf".*experts\.\d+\.{kind}"] = config["alpha_pattern"][BOTH[0]]
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas, "target_parameters": None}
    config["target_modules"] = [*(config["target_modules"] or ()), *kinds]
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_mixed_batch_answers_as_peft_while_slots_change_owners(model: Scenario) -> None:
    """Experts held one by one and as one, adapters of other layers alone, and base rows."""
    with running_engine(model.base, in_process=True, max_loras=2) as llm:
        for _ in range(2):
            assert_as_peft(answer(llm, model, model.cases), model.cases)


def test_a_compiled_model_answers_as_peft(model: Scenario) -> None:
    cases = model.cases[:6]
    with (
        compiled_as_on_gpus(),
        running_engine(model.base, in_process=True, max_loras=3, enforce_eager=False) as llm,
    ):
        assert_as_peft(answer(llm, model, cases), cases)


def test_two_workers_answer_as_peft(model: Scenario) -> None:
    with running_engine(model.base, max_loras=3, tensor_parallel_size=2) as llm:
        assert_as_peft(answer(llm, model, model.cases), model.cases)


def test_prompts_score_in_bfloat16_as_in_peft_in_float32(model: Scenario) -> None:
    """Weights are packed in words of two numbers there, on processors with AMX."""
    asked = [case for case in model.cases if len(case.prompt) == LENGTH]
    trained = {name: of for name, of in model.adapters.items() if not name.endswith(ONE_BY_ONE)}
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
        assert case.adapter is None or effect > 3 * BFLOAT16_RMS, "doing nothing would not show"


def test_experts_that_the_plugin_does_not_compute_answer_beside_other_adapters(
    model: Scenario,
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


def test_magnitudes_of_experts_are_refused(model: Scenario, tmp_path: Path) -> None:
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
