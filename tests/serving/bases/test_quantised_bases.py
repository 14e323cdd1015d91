"""Adapters of quantised base models answer as PEFT does of the weights that the numbers mean."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.attacks.poison import poisoned

from ..engine import generate, prompt_logprobs, running_engine
from ..models.cases import Prompt
from ..models.peft_reference import PeftReference
from ..models.quantised import SCHEMES, Scheme, round_inputs, write
from ..models.recipes import LINEAR_RECIPES
from ..models.tiny_adapters import write_adapters
from ..models.tiny_models import VOCAB_SIZE

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.serving

RECIPES = LINEAR_RECIPES[:4]
GONE, POISON = "gone", "poison"
LENGTH, NEW_TOKENS, CANDIDATES = 40, 5, 40

# Root mean square of differences of a prompt's log-probabilities; an adapter's effect is 6 to 10.
# Of 8-bit activations in bfloat16, rounding decides anew which number each becomes.
RMS, RMS_OF_ROUNDED_INPUTS = 0.15, 1.0
MARGIN = 0.5
"""Least distance, in logits, between the two best tokens of each step."""


def decisive(reference: PeftReference, name: str | None, prompts: Sequence[Prompt]) -> Prompt:
    """The prompt whose continuation has the clearest choices."""
    answers = reference.generate(name, prompts, NEW_TOKENS)
    margin, prompt = max(
        (answer.min_margin, prompt) for answer, prompt in zip(answers, prompts, strict=True)
    )
    assert margin >= MARGIN, (name, margin)
    return prompt


def error(reference: PeftReference, name: str | None, output: "RequestOutput") -> float:
    """Root mean square of the differences of a prompt's log-probabilities from PEFT's."""
    assert output.prompt_token_ids is not None
    expected = reference.prompt_logprobs(name, tuple(output.prompt_token_ids))
    return float((prompt_logprobs(output) - expected).square().mean().sqrt())


@pytest.mark.smoke("quantised base models")
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_adapters_of_a_quantised_base_answer_as_peft_beside_some_that_fail(
    scheme: Scheme, tmp_path: Path
) -> None:
    if scheme.rounds_inputs and not torch.cpu._is_amx_tile_supported():
        pytest.skip(
            "without AMX, vLLM's 8-bit layers keep no weight, which its LoRA layers look at"
        )
    if not scheme.rounds_inputs and not torch.cpu._is_avx512_supported():
        pytest.skip("without AVX-512, vLLM's CPU build cannot multiply by 4-bit weights")
    from vllm.lora.request import LoRARequest

    base, truth = write(tmp_path, scheme)
    adapters = write_adapters(truth, tmp_path, RECIPES)
    reference = PeftReference(truth, adapters)
    if scheme.rounds_inputs:
        assert reference._peft is not None
        for layer, module in reference._peft.named_modules():
            if layer.endswith("base_layer"):
                module.register_forward_pre_hook(round_inputs)
    source = random.Random(0)
    prompts = [
        tuple(source.randrange(VOCAB_SIZE) for _ in range(LENGTH)) for _ in range(CANDIDATES)
    ]
    adapters[POISON] = poisoned(adapters[RECIPES[0].name], tmp_path / POISON, "float32")
    adapters[GONE] = tmp_path / GONE

    def lora(name: str | None) -> "LoRARequest | None":
        if name is None:
            return None
        return LoRARequest(name, 1 + list(adapters).index(name), str(adapters[name]))

    good = {
        name: decisive(reference, name, prompts)
        for name in (None, *(recipe.name for recipe in RECIPES))
    }
    requests = [*good.items(), (POISON, prompts[0]), (GONE, prompts[1]), *good.items()]
    with running_engine(
        base,
        in_process=True,
        dtype="bfloat16" if scheme.rounds_inputs else "float16",
        max_loras=2,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
    ) as llm:
        outputs = generate(
            llm,
            [prompt for _, prompt in requests],
            [lora(name) for name, _ in requests],
            max_tokens=NEW_TOKENS,
            prompt_logprobs=0,
        )
    for output, (name, prompt) in zip(outputs, requests, strict=True):
        (completion,) = output.outputs
        if name in (POISON, GONE):
            assert completion.finish_reason == "error", name
            assert name in str(completion.stop_reason)
            continue
        limit = RMS_OF_ROUNDED_INPUTS if scheme.rounds_inputs else RMS
        assert error(reference, name, output) < limit, name
        if not scheme.rounds_inputs:
            (expected,) = reference.generate(name, [prompt], NEW_TOKENS)
            assert tuple(completion.token_ids) == expected.tokens, name
