"""Other forms of a base model: Transformers' own code, two names for one layer, layers of state."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.attacks.poison import poisoned

from ..engine import (
    BEFORE_0_32,
    answer,
    assert_as_peft,
    assert_others_as_peft,
    generate,
    lora_request,
    prompt_logprobs,
    running_engine,
)
from ..models.cases import MIN_MARGIN, NEW_TOKENS, Case, Scenario
from ..models.peft_reference import PeftReference
from ..models.recipes import EMBEDDING_RECIPE, AdapterRecipe
from ..models.scenarios import build_scenario
from ..models.tiny_adapters import write_adapters
from ..models.tiny_models import (
    write_gemma4,
    write_glm4,
    write_granite_hybrid,
)

pytestmark = pytest.mark.serving

LENGTH = 23
"""Tokens of a prompt."""
ALIASED = "AliasedLayersLlamaForCausalLM"
BFLOAT16_RMS = 0.5  # PEFT in bfloat16 is 0.37 from float32 itself


def test_transformers_own_model_answers_as_peft(llama: Scenario) -> None:
    """vLLM adapts no output head there: an adapter of one is refused, and nobody else's."""
    all_cases = [case for case in llama.cases if len(case.prompt) == LENGTH]
    head = [case for case in all_cases if case.adapter == EMBEDDING_RECIPE.name]
    cases = [case for case in all_cases if case.adapter != EMBEDDING_RECIPE.name]
    # Not in this process: what vLLM makes of Transformers there would be in the references, too.
    with running_engine(llama.base, max_loras=2, model_impl="transformers") as llm:
        outputs = answer(llm, llama, [*head, *cases])
    assert_as_peft(outputs[len(head) :], cases)
    for output in outputs[: len(head)]:
        assert output.outputs[0].finish_reason == "error"
        assert "lm_head" in str(output.outputs[0].stop_reason)


def test_layers_of_two_names_are_adapted_once(llama: Scenario) -> None:
    from vllm import ModelRegistry

    from ..models.aliased_layers import AliasedLayersLlamaForCausalLM

    ModelRegistry.register_model(ALIASED, AliasedLayersLlamaForCausalLM)
    cases = [case for case in llama.cases if len(case.prompt) == LENGTH]
    with running_engine(
        llama.base, in_process=True, max_loras=2, hf_overrides={"architectures": [ALIASED]}
    ) as llm:
        assert_as_peft(answer(llm, llama, cases), cases)


def test_adapters_of_keys_that_are_values_too_act_on_both(tmp_path: Path) -> None:
    recipes = (AdapterRecipe("keys-r8", ("k_proj",), gain=1.0), AdapterRecipe("all", gain=0.8))
    gemma = build_scenario(tmp_path, write_gemma4, recipes, lengths=(7, LENGTH))
    with running_engine(gemma.base, in_process=True, max_loras=2) as llm:
        assert_as_peft(answer(llm, gemma, gemma.cases), gemma.cases)


def test_adapters_of_what_transformers_has_as_one_act_on_all_of_it(tmp_path: Path) -> None:
    recipes = (
        AdapterRecipe("merged-r8", ("gate_up_proj",), gain=1.0),
        AdapterRecipe("all", ("q_proj", "gate_up_proj", "down_proj"), rank=5, gain=0.8),
    )
    glm = build_scenario(tmp_path, write_glm4, recipes, lengths=(7, LENGTH))
    with running_engine(glm.base, in_process=True, max_loras=2) as llm:
        assert_as_peft(answer(llm, glm, glm.cases), glm.cases)


@pytest.mark.skipif(BEFORE_0_32, reason="on CPUs in bfloat16 alone before vLLM 0.32")
@pytest.mark.smoke("models with a state")
def test_layers_of_state_answer_as_peft_beside_adapters_that_fail(tmp_path: Path) -> None:
    """None of what an adapter leaves in a state that overflows is another request's."""
    recipes = (
        AdapterRecipe("state-in", ("in_proj", "q_proj", "v_proj"), gain=1.0),
        AdapterRecipe("state-out", ("out_proj", "o_proj", "input_linear"), gain=1.0),
    )
    hybrid = build_scenario(tmp_path, write_granite_hybrid, recipes, lengths=(7, 40))
    source = hybrid.adapters["state-in"]
    failing = {
        **{
            part: poisoned(source, tmp_path / part, "float32", number, part=part)
            for number, part in enumerate(("in_proj", "v_proj"))
        },
        "gone": tmp_path / "gone",
    }
    deployed = Scenario(hybrid.base, {**hybrid.adapters, **failing}, ())
    cases = [
        *hybrid.cases * 3,
        *(replace(case, adapter=name) for case in hybrid.cases_of(None) for name in failing),
    ]
    random.Random(1).shuffle(cases)
    with running_engine(
        hybrid.base, in_process=True, max_loras=1, max_cpu_loras=2, num_gpu_blocks_override=40
    ) as llm:
        for _ in range(2):
            assert_others_as_peft(answer(llm, deployed, cases), cases, failing)


@pytest.mark.smoke("models with a state")
def test_layers_of_state_score_prompts_in_bfloat16_as_peft_does_in_float32(tmp_path: Path) -> None:
    recipes = (
        AdapterRecipe("state-in", ("in_proj", "q_proj"), gain=1.0),
        AdapterRecipe("state-out", ("out_proj", "o_proj"), gain=1.0),
    )
    base = write_granite_hybrid(tmp_path / "base")
    hybrid = Scenario(base, write_adapters(base, tmp_path, recipes), ())
    reference = PeftReference(base, hybrid.adapters)
    dice = random.Random(2)
    prompts = [tuple(dice.randrange(240) for _ in range(length)) for length in (LENGTH, 40)]
    asked = [(name, prompt) for prompt in prompts for name in (None, *hybrid.adapters)]
    with running_engine(base, in_process=True, dtype="bfloat16", max_loras=1) as llm:
        loras = [name and lora_request(hybrid, name) for name, _ in asked]
        prompts = [prompt for _, prompt in asked]
        outputs = generate(llm, prompts, loras, max_tokens=1, prompt_logprobs=0)
    found = torch.cat([prompt_logprobs(output) for output in outputs])
    exact = torch.cat([reference.prompt_logprobs(*one) for one in asked])
    plain = torch.cat([reference.prompt_logprobs(None, prompt) for _, prompt in asked])
    assert rms(found - exact) < BFLOAT16_RMS
    assert rms(plain - exact) > 5 * BFLOAT16_RMS, "adapters that do nothing would not show"


def rms(errors: torch.Tensor) -> float:
    return errors.square().mean().sqrt().item()


@pytest.mark.skipif(BEFORE_0_32, reason="on CPUs in bfloat16 alone before vLLM 0.32")
def test_layers_of_state_take_adapters_of_every_kind(tmp_path: Path) -> None:
    """What they project is five parts to vLLM, and one to checkpoints."""
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.blends import blended

    state = ("in_proj", "out_proj")
    recipes = (
        AdapterRecipe("plain", state, gain=1.0),
        AdapterRecipe("other", ("in_proj", "q_proj"), rank=5, gain=1.0),
        AdapterRecipe("dora", state, gain=1.0, dora=True),
        AdapterRecipe("activated", state, gain=1.0, invocation=(250, 17)),
    )
    weights = {"plain": 0.7, "other": 0.5}
    base = write_granite_hybrid(tmp_path / "base")
    adapters = write_adapters(base, tmp_path, recipes)
    reference = PeftReference(base, adapters)
    reference.blend("blend", weights)
    loras = {
        name: LoRARequest(name, number, str(path))
        for number, (name, path) in enumerate(adapters.items(), 1)
    }
    loras["blend"] = blended([(loras[name], weight) for name, weight in weights.items()])
    dice = random.Random(3)
    prompts = [
        (*(dice.randrange(240) for _ in range(LENGTH)), 250, 17, dice.randrange(240))
        for _ in range(3)
    ]
    cases = [
        Case(name, prompt, expected)
        for name in (None, *loras)
        for prompt, expected in zip(
            prompts, reference.generate(name, prompts, NEW_TOKENS), strict=True
        )
        if expected.min_margin >= MIN_MARGIN
    ]
    assert {case.adapter for case in cases} == {None, *loras}
    with running_engine(
        base,
        in_process=True,
        max_loras=2,
        max_num_batched_tokens=24,
        additional_config={"multilora": {"dora": True}},
    ) as llm:
        asked = [case.adapter and loras[case.adapter] for case in cases]
        outputs = generate(llm, [case.prompt for case in cases], asked)
    assert_as_peft(outputs, cases)
