"""Adapters of lm_head on models that do more to logits than to multiply by it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ..engine import generate, loras_of, prompt_logprobs, running_engine
from ..models.cases import Scenario
from ..models.peft_reference import PeftReference
from ..models.recipes import EMBEDDING_RECIPE, LINEAR_RECIPES
from ..models.scenarios import build_scenario
from ..models.tiny_models import write_granite

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

NAMES = (LINEAR_RECIPES[0].name, LINEAR_RECIPES[3].name, EMBEDDING_RECIPE.name)
LENGTHS = (7, 23)
LATE_NORM = "LateNormLlamaForCausalLM"


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    recipes = (LINEAR_RECIPES[0], LINEAR_RECIPES[3], EMBEDDING_RECIPE)
    folder = tmp_path_factory.mktemp("granite")
    return build_scenario(folder, write_granite, recipes, lengths=LENGTHS)


@pytest.fixture(params=["scales", "normalises"])
def served(request: pytest.FixtureRequest) -> "Iterator[tuple[Scenario, LLM]]":
    """Fewer slots than adapters, and parts of prompts in each step."""
    overrides: dict[str, Any] = {}
    if request.param == "scales":
        scenario = request.getfixturevalue("granite")
    else:
        from vllm import ModelRegistry

        from ..models.late_norm import LateNormLlamaForCausalLM

        scenario = request.getfixturevalue("llama")
        ModelRegistry.register_model(LATE_NORM, LateNormLlamaForCausalLM)
        overrides = {"hf_overrides": {"architectures": [LATE_NORM]}}
    with running_engine(
        scenario.base,
        in_process=True,
        max_loras=2,
        max_num_batched_tokens=24,
        enable_prefix_caching=False,
        **overrides,
    ) as llm:
        yield scenario, llm


@pytest.mark.smoke("prompt_logprobs", "`embed_tokens` and `lm_head`")
def test_prompts_and_answers_are_scored_as_by_peft(
    served: "tuple[Scenario, LLM]", tmp_path: Path
) -> None:
    """In one batch with an adapter that fails, which alone says so."""
    from vllm.lora.request import LoRARequest

    scenario, llm = served
    cases = [
        case
        for length in LENGTHS
        for name in (None, *NAMES)
        for case in scenario.cases_of(name)
        if len(case.prompt) == length
    ]
    gone = LoRARequest("gone", 99, str(tmp_path / "gone"))
    outputs = generate(
        llm,
        [case.prompt for case in (*cases, cases[0])],
        [*loras_of(scenario, cases), gone],
        prompt_logprobs=1,
    )
    assert outputs[-1].outputs[0].finish_reason == "error"
    references = {
        name: PeftReference(scenario.base, {name: scenario.adapters[name]} if name else {})
        for name in (None, *NAMES)
    }
    for output, case in zip(outputs, cases, strict=False):
        assert tuple(output.outputs[0].token_ids) == case.expected.tokens, case.adapter
        expected = references[case.adapter].prompt_logprobs(case.adapter, case.prompt)
        torch.testing.assert_close(prompt_logprobs(output), expected, atol=2e-3, rtol=0)
