"""What the examples' tests compare answers with."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving.kinds.test_demo_adapters import scenario

sys.path.append(str(Path(__file__).parent / "demo"))

PEFT_TOKENS = 12


@pytest.fixture(scope="session")
def pefts_answer() -> Callable[[Any, str | None], str]:
    """What PEFT answers to a customer's question with any adapter: the first 12 tokens."""
    from prompts import CUSTOMERS
    from transformers import AutoTokenizer

    found, reference = scenario(PEFT_TOKENS, "float32")
    prompts = {who.name: case.prompt for who, case in zip(CUSTOMERS, found.cases, strict=True)}
    tokenizer = AutoTokenizer.from_pretrained(found.base)

    def answer(customer: Any, adapter: str | None) -> str:
        [continuation] = reference.generate(adapter, [prompts[customer.name]], PEFT_TOKENS)
        return str(tokenizer.decode(continuation.tokens, skip_special_tokens=True))

    return answer
