"""The demo's trained adapters on SmolLM2: one mixed batch, answered as PEFT answers."""

import sys
from pathlib import Path

import pytest

from .cases import Case, Scenario
from .engine import answer, running_engine

pytestmark = pytest.mark.serving

DEMO = Path(__file__).parents[2] / "examples" / "demo"
NEW_TOKENS = 12
BFLOAT16_TOKENS = 4
# Both sides round every layer's output and the logits to 8 bits, at other places; logits between 16
# and 32 are then 0.125 apart. So the likeliest tokens are compared, those of at least 1 %.
BFLOAT16_LOGPROB_ATOL = 0.3
COMPARED_LOGPROB = -4.6

SETTINGS = {
    "skip_tokenizer_init": False,
    "max_loras": 4,
    "max_cpu_loras": 4,
    "max_lora_rank": 32,
    "max_model_len": 256,
}


def scenario(new_tokens: int, dtype: str) -> Scenario:
    import torch
    from transformers import AutoTokenizer

    from .peft_reference import PeftReference

    sys.path.insert(0, str(DEMO))
    try:
        from base_model import build_base_model
        from prompts import CUSTOMERS
    finally:
        sys.path.remove(str(DEMO))
    base = build_base_model()
    adapters = {c.adapter: DEMO / "adapters" / c.adapter for c in CUSTOMERS if c.adapter}
    tokenizer = AutoTokenizer.from_pretrained(base)
    reference = PeftReference(base, adapters, dtype=getattr(torch, dtype))
    cases = []
    for customer in CUSTOMERS:
        prompt = tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": customer.prompt}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        [expected] = reference.generate(customer.adapter, [prompt], new_tokens)
        cases.append(Case(customer.adapter, prompt, expected))
    return Scenario(base, adapters, tuple(cases))


@pytest.fixture(scope="module")
def float32_scenario() -> Scenario:
    return scenario(NEW_TOKENS, "float32")


@pytest.fixture(scope="module")
def offline_tokens(float32_scenario: Scenario) -> list[tuple[int, ...]]:
    with running_engine(float32_scenario.base, in_process=True, **SETTINGS) as llm:
        outputs = answer(llm, float32_scenario, float32_scenario.cases, new_tokens=NEW_TOKENS)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("index", range(5), ids=lambda i: f"customer-{i}")
def test_offline_in_float32_every_token_is_pefts(float32_scenario, offline_tokens, index):
    assert offline_tokens[index] == float32_scenario.cases[index].expected.tokens


def test_in_bfloat16_log_probabilities_agree():
    expected = scenario(BFLOAT16_TOKENS, "bfloat16")
    with running_engine(expected.base, in_process=True, **SETTINGS | {"dtype": "bfloat16"}) as llm:
        outputs = answer(llm, expected, expected.cases, new_tokens=BFLOAT16_TOKENS)
    for output, case in zip(outputs, expected.cases, strict=True):
        tokens = output.outputs[0].token_ids
        for step, found in enumerate(output.outputs[0].logprobs):
            ranked = sorted((entry.logprob for entry in found.values()), reverse=True)
            likely = [p for p in case.expected.top[step].values() if p >= COMPARED_LOGPROB]
            assert ranked[: len(likely)] == pytest.approx(likely, abs=BFLOAT16_LOGPROB_ATOL)
            if tokens[step] != case.expected.tokens[step]:
                # A near tie fell the other way; from here on the two continue other prompts.
                assert case.expected.margins[step] < BFLOAT16_LOGPROB_ATOL
                break
