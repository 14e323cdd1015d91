"""The demo's trained adapters on SmolLM2: one mixed batch, answered as PEFT answers."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..engine import answer, running_engine
from ..models.cases import Case, Scenario

if TYPE_CHECKING:
    from ..models.peft_reference import PeftReference

pytestmark = pytest.mark.serving

DEMO = Path(__file__).parents[3] / "examples" / "demo"
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


def scenario(new_tokens: int, dtype: str) -> tuple[Scenario, "PeftReference"]:
    """A case of each customer, and who answered them."""
    import torch
    from transformers import AutoTokenizer

    from ..models.peft_reference import PeftReference

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
    return Scenario(base, adapters, tuple(cases)), reference


@pytest.fixture(scope="module")
def offline_and_peft() -> list[tuple[tuple[int, ...], list[int]]]:
    """Per customer, the engine's tokens, and what PEFT would have written in the place of each.

    PEFT decodes the first, and then reads the engine's answer at once: where it agrees with every
    token, it would have decoded the same ones, one after the other.
    """
    customers, reference = scenario(1, "float32")
    with running_engine(customers.base, in_process=True, **SETTINGS) as llm:
        outputs = answer(llm, customers, customers.cases, new_tokens=NEW_TOKENS)
    found = []
    for output, case in zip(outputs, customers.cases, strict=True):
        tokens = tuple(output.outputs[0].token_ids)
        likeliest = reference.likeliest(case.adapter, (*case.prompt, *tokens[:-1]))
        pefts = [*case.expected.tokens, *likeliest[len(case.prompt) :]]
        found.append((tokens, pefts))
    return found


@pytest.mark.parametrize("index", range(5), ids=lambda i: f"customer-{i}")
def test_offline_in_float32_every_token_is_pefts(offline_and_peft, index):
    tokens, pefts = offline_and_peft[index]
    assert len(tokens) == NEW_TOKENS
    assert list(tokens) == pefts


def test_in_bfloat16_log_probabilities_agree():
    expected, _ = scenario(BFLOAT16_TOKENS, "bfloat16")
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
