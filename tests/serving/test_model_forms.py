"""A base model in other forms: Transformers' own code, and two names for one layer."""

import pytest

from .cases import Scenario
from .engine import answer, assert_as_peft, running_engine
from .recipes import EMBEDDING_RECIPE

pytestmark = pytest.mark.serving

LENGTH = 23
"""Of the prompts."""
ALIASED = "AliasedLayersLlamaForCausalLM"


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

    from .aliased_layers import AliasedLayersLlamaForCausalLM

    ModelRegistry.register_model(ALIASED, AliasedLayersLlamaForCausalLM)
    cases = [case for case in llama.cases if len(case.prompt) == LENGTH]
    with running_engine(
        llama.base, in_process=True, max_loras=2, hf_overrides={"architectures": [ALIASED]}
    ) as llm:
        assert_as_peft(answer(llm, llama, cases), cases)
