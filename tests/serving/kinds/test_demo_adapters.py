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


def scenario(new_tokens: int) -> tuple[Scenario, "PeftReference"]:
    """A case of each customer, and who answered them."""
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
    reference = PeftReference(base, adapters)
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


def test_offline_in_float32_every_token_is_pefts() -> None:
    """PEFT decodes the first token, and reads the engine's answer at once for those after it.

    Where it agrees with every token, it would have decoded the same ones, one after the other.
    """
    customers, reference = scenario(1)
    with running_engine(
        customers.base,
        in_process=True,
        skip_tokenizer_init=False,
        max_lora_rank=32,
        max_model_len=256,
    ) as llm:
        outputs = answer(llm, customers, customers.cases, new_tokens=NEW_TOKENS)
    for output, case in zip(outputs, customers.cases, strict=True):
        tokens = list(output.outputs[0].token_ids)
        likeliest = reference.likeliest(case.adapter, (*case.prompt, *tokens[:-1]))
        assert len(tokens) == NEW_TOKENS
        assert tokens == [*case.expected.tokens, *likeliest[len(case.prompt) :]], case.adapter
