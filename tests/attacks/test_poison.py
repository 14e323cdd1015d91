"""An adapter that overflows in use changes nobody else's answers, and is taken out of service."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from tests.serving import template
from tests.serving.engine import (
    answer,
    lora_request,
    needs_drafts,
    needs_ngram_drafts,
    running_engine,
)
from tests.serving.models.cases import Case, Scenario

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

pytestmark = pytest.mark.serving

POISON = "poison"
ROUNDS = 4
SOURCE = "customer-1"


def poisoned(source: Path, target: Path, value: float = 1e19) -> Path:
    """Weights that pass every check, and whose products overflow in v_proj."""
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "v_proj" in name:
            tensors[name].fill_(value)
    save_file(tensors, file)
    return target


SETTINGS: tuple[Any, ...] = (
    pytest.param(
        {"block_size": 32, "enable_prefix_caching": False},
        id="block-32",
        marks=pytest.mark.smoke("quarantine"),
    ),
    pytest.param({"block_size": 128, "enable_prefix_caching": True}, id="block-128-prefixes"),
)


@pytest.fixture(scope="module", params=SETTINGS)
def engine(fleet: Scenario, request: pytest.FixtureRequest) -> Iterator["LLM"]:
    # Few blocks, so that those of the attacker go round; chunks, so that it is met in mid-prefill.
    with running_engine(
        fleet.base,
        in_process=True,
        **request.param,
        max_loras=4,
        max_cpu_loras=8,
        num_gpu_blocks_override=24,
        max_num_batched_tokens=64,
        max_num_seqs=8,
    ) as llm:
        yield llm


def attack(llm: "LLM", poison: Path, number: int, length: int) -> "list[RequestOutput]":
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    return llm.generate(
        [{"prompt_token_ids": [(7 * i + number) % 300 for i in range(length)]} for _ in range(3)],
        SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False),
        lora_request=LoRARequest(POISON, number, str(poison)),
        use_tqdm=False,
    )


def others(fleet: Scenario) -> list[Case]:
    return [fleet.cases_of(name)[0] for name in (None, *(f"customer-{i}" for i in range(2, 15)))]


def test_nobody_elses_answer_changes(engine: "LLM", fleet: Scenario, tmp_path: Path) -> None:
    """Each round has weights of its own: quarantined ones would attack no more."""
    for number in range(ROUNDS):
        source = fleet.adapters[SOURCE]
        poison = poisoned(source, tmp_path / f"{number}", 1e19 * (1 + number / 10))
        for output in attack(engine, poison, 1000 + number, length=100):
            completion = output.outputs[0]
            assert completion.finish_reason == "error"
            assert "quarantined" in completion.stop_reason
            assert POISON in completion.stop_reason
        cases = others(fleet)
        for output, case in zip(answer(engine, fleet, cases), cases, strict=True):
            assert tuple(output.outputs[0].token_ids) == case.expected.tokens, case.adapter


def test_a_quarantined_adapter_is_shown_and_serves_again_with_other_weights(
    engine: "LLM", fleet: Scenario, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    poison = poisoned(fleet.adapters[SOURCE], tmp_path / POISON, 2e19)
    attack(engine, poison, 2000, length=20)
    [report] = engine.collective_rpc("multilora_adapter_status", args=([],))
    [row] = [row for row in report["adapters"] if row["int_id"] == 2000]
    assert row["state"] == "quarantined"
    assert "not finite" in row["last_error"]
    assert engine.llm_engine.remove_lora(2000)
    case = fleet.cases_of(SOURCE)[0]
    from vllm import SamplingParams

    [output] = engine.generate(
        [{"prompt_token_ids": list(case.prompt)}],
        SamplingParams(
            temperature=0.0, max_tokens=len(case.expected.tokens), ignore_eos=True, detokenize=False
        ),
        lora_request=LoRARequest(POISON, 2000, str(fleet.adapters[SOURCE])),
        use_tqdm=False,
    )
    assert tuple(output.outputs[0].token_ids) == case.expected.tokens


NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}


@needs_drafts
@needs_ngram_drafts
@pytest.mark.smoke("quarantine", "speculative decoding (ngram)")
def test_with_drafted_tokens_nobody_else_is_blamed(fleet: Scenario, tmp_path: Path) -> None:
    """A request has several rows of logits then; vLLM counts their NaN row by row."""
    from vllm.lora.request import LoRARequest

    long = [
        Asked(f"long {i}", [7 + i, 21] * 10, 90, lora_request(fleet, f"customer-{2 + i}"))
        for i in range(2)
    ]
    # The attacker's row is the ninth, and the ninth request one of these.
    short = [Asked(f"short {i}", [i, 50 + i], 10, None) for i in range(10)]
    folder = poisoned(fleet.adapters[SOURCE], tmp_path / POISON, 3e19)
    attack = Asked(POISON, [7, 21] * 10, 10, LoRARequest(POISON, 1000, str(folder)))
    # An engine in this process would leave threads that others' tests wait for.
    with template.forked_processes(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        undisturbed, disturbed = pool.submit(with_drafts, fleet.base, long, short, attack).result(
            timeout=300
        )
    end, reason, _ = disturbed.pop(POISON)
    assert end == "error"
    assert "quarantined" in reason
    assert {end for end, _, _ in disturbed.values()} == {"length"}
    assert disturbed == undisturbed


Answer = tuple[str | None, Any, tuple[int, ...]]
"""Why it has ended, with which reason, and its tokens."""


def with_drafts(
    base: Path, long: "list[Asked]", short: "list[Asked]", attack: "Asked"
) -> tuple[dict[str, Answer], dict[str, Answer]]:
    """Answers by name, without the attack and with it."""
    with running_engine(
        base,
        in_process=True,  # the scheduler is looked at
        speculative_config=NGRAM,
        max_loras=4,
        max_num_batched_tokens=64,
        max_num_seqs=16,
        enable_prefix_caching=False,
    ) as llm:
        # They would be loaded while others get their answers, and the long ones not begin together.
        for each in (attack, *long):
            assert llm.llm_engine.add_lora(each.lora)
        assert llm.llm_engine.pin_lora(attack.lora.lora_int_id)
        return answers_to(llm, long, short), answers_to(llm, long, [attack, *short])


@dataclass(frozen=True)
class Asked:
    """A request."""

    name: str
    prompt: list[int]
    tokens: int
    lora: Any


def answers_to(llm: "LLM", first: list[Asked], late: list[Asked]) -> dict[str, Answer]:
    """Answers by name; the late ones come before a step in which all the first have drafts."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    answers: dict[str, Answer] = {}
    waiting = [first, late]

    def ask() -> None:
        for each in waiting.pop(0):
            sampling = SamplingParams(
                temperature=0.0, max_tokens=each.tokens, ignore_eos=True, detokenize=False
            )
            prompt: Any = {"prompt_token_ids": each.prompt}
            engine.add_request(each.name, prompt, sampling, lora_request=each.lora)

    ask()
    for _ in range(20_000):
        for output in engine.step():
            if output.finished:
                end = output.outputs[0]
                tokens = tuple(end.token_ids)
                answers[output.request_id] = end.finish_reason, end.stop_reason, tokens
        drafts = [len(request.spec_token_ids) for request in scheduler.requests.values()]
        if waiting and drafts == [NGRAM["num_speculative_tokens"]] * len(first):
            ask()
        if not engine.has_unfinished_requests():
            assert not waiting, "there was no step in which all had drafts"
            return answers
    raise AssertionError("requests do not end")
