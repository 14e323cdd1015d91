"""What the examples' tests compare answers with."""

from typing import Any

import pytest
from fleet_checks import PEFT_TOKENS, Pefts
from prompts import CUSTOMERS

from tests.serving.kinds.test_demo_adapters import scenario


@pytest.fixture(scope="session")
def pefts_answer() -> Pefts:
    from transformers import AutoTokenizer

    found, reference = scenario(PEFT_TOKENS)
    prompts = {who.name: case.prompt for who, case in zip(CUSTOMERS, found.cases, strict=True)}
    tokenizer = AutoTokenizer.from_pretrained(found.base)

    def answer(customer: Any, adapter: str | None) -> str:
        [continuation] = reference.generate(adapter, [prompts[customer.name]], PEFT_TOKENS)
        return str(tokenizer.decode(continuation.tokens, skip_special_tokens=True))

    return answer
