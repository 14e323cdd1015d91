"""What the tests of the examples of fleets share."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fleets import Fleet, content
from prompts import CUSTOMERS, Customer

PEFT_TOKENS = 12
ASKED_AT_ONCE = 8

Pefts = Callable[[Customer, str | None], str]
"""What PEFT answers to a customer's question with any adapter: the first `PEFT_TOKENS` tokens."""

LEGAL = next(customer for customer in CUSTOMERS if customer.adapter == "legal")


def ask(fleet: Fleet, customer: Customer, adapter: str | None = None) -> str:
    """An answer as long as PEFT's."""
    return content(fleet.ask(customer, adapter, max_tokens=PEFT_TOKENS))


def assert_forty_mixed_answers_are_pefts(fleet: Fleet, pefts_answer: Pefts) -> None:
    right = {each.name: pefts_answer(each, each.adapter) for each in CUSTOMERS}
    asked = [CUSTOMERS[number % len(CUSTOMERS)] for number in range(40)]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        answers = list(threads.map(lambda customer: ask(fleet, customer), asked))
    assert answers == [right[customer.name] for customer in asked]


def spoil(folder: Path, fault: str) -> None:
    """Puts a NaN among an adapter's weights (`nan`), or leaves a row of them out (`shape`)."""
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(each for each in sorted(tensors) if "lora_B" in each)
    if fault == "nan":
        tensors[name][0, 0] = torch.nan
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file)
