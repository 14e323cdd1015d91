"""Ray Serve LLM over a bucket, with this plugin; answers are compared with PEFT's.

Not among the tests of `make test`, since it needs Ray: `make test-ray`.
"""

import runpy
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

PEFT_TOKENS = 12
ASKED_AT_ONCE = 8
RESTART_LIMIT_S = 240.0

example = runpy.run_path(str(Path(__file__).with_name("fleet.py")))
ADAPTERS, CUSTOMERS = example["ADAPTERS"], example["CUSTOMERS"]
LEGAL = next(customer for customer in CUSTOMERS if customer.adapter == "legal")

Pefts = Callable[[Any, str | None], str]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Any]:
    with example["Fleet"](example["build_base_model"]()) as fleet:
        for customer in CUSTOMERS:
            if customer.adapter is not None:
                fleet.put(customer.adapter, ADAPTERS / customer.adapter)
        yield fleet


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def ask(fleet: Any, customer: Any, adapter: str | None = None) -> str:
    return content(fleet.ask(customer, adapter, max_tokens=PEFT_TOKENS))


def test_first_requests_at_once_for_a_cold_adapter_are_all_answered(
    fleet: Any, pefts_answer: Pefts
) -> None:
    """Ray loads an adapter once for each of them."""
    fleet.put("burst", ADAPTERS / "legal")
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda _: ask(fleet, LEGAL, "burst"), range(6)))
    assert answers == 6 * [pefts_answer(LEGAL, "legal")]


def test_forty_mixed_answers_are_pefts(fleet: Any, pefts_answer: Pefts) -> None:
    right = {each.name: pefts_answer(each, each.adapter) for each in CUSTOMERS}
    asked = [CUSTOMERS[number % len(CUSTOMERS)] for number in range(40)]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        answers = list(threads.map(lambda customer: ask(fleet, customer), asked))
    assert answers == [right[customer.name] for customer in asked]


@pytest.mark.parametrize(("fault", "reason"), [("nan", "NaN"), ("shape", "shape")])
def test_a_bad_adapter_is_refused_with_its_reason_and_harms_nobody(
    fleet: Any, pefts_answer: Pefts, tmp_path: Path, fault: str, reason: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(ADAPTERS / "legal", tmp_path / "bad"))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(each for each in sorted(tensors) if "lora_B" in each)
    if fault == "nan":
        tensors[name][0, 0] = torch.nan
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file)
    fleet.put(f"bad-{fault}", folder)
    answer = fleet.ask(LEGAL, f"bad-{fault}")
    assert answer.status_code >= 400
    assert reason in answer.text
    assert "multilora-refused" not in answer.text
    assert ask(fleet, LEGAL) == pefts_answer(LEGAL, "legal")


def test_an_adapter_that_is_not_in_the_bucket_is_not_answered_by_the_base_model(
    fleet: Any,
) -> None:
    assert fleet.ask(LEGAL, "missing").status_code == 404


def test_new_weights_under_a_new_name_serve_beside_the_old_ones(
    fleet: Any, pefts_answer: Pefts
) -> None:
    """Ray keeps what it has downloaded: under an old name it serves the old weights."""
    fleet.put("legal-v2", ADAPTERS / "medical")
    assert ask(fleet, LEGAL, "legal-v2") == pefts_answer(LEGAL, "medical")
    assert ask(fleet, LEGAL) == pefts_answer(LEGAL, "legal")


def test_a_replica_that_is_killed_comes_back_with_its_adapters(
    fleet: Any, pefts_answer: Pefts
) -> None:
    [replica] = [
        each
        for each in psutil.process_iter(["cmdline"])
        if "LLMServer" in " ".join(each.info["cmdline"] or [])
    ]
    replica.kill()
    right, end = pefts_answer(LEGAL, "legal"), time.monotonic() + RESTART_LIMIT_S
    while True:
        try:
            answer = fleet.ask(LEGAL, max_tokens=PEFT_TOKENS)
            if answer.is_success:
                assert content(answer) == right
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end
        time.sleep(1)
