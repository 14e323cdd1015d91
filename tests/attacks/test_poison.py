"""With drafted tokens, an adapter that overflows in use changes nobody else's answers."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving import template
from tests.serving.engine import (
    lora_request,
    needs_drafts,
    needs_ngram_drafts,
    running_engine,
)
from tests.serving.models.cases import Scenario

from .poison import NAME, poisoned

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

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
    folder = poisoned(fleet.adapters["customer-1"], tmp_path / NAME, "float32")
    attack = Asked(NAME, [7, 21] * 10, 10, LoRARequest(NAME, 1000, str(folder)))
    # An engine in this process would leave threads that others' tests wait for.
    with template.forked_processes(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        undisturbed, disturbed = pool.submit(with_drafts, fleet.base, long, short, attack).result(
            timeout=300
        )
    end, reason, _ = disturbed.pop(NAME)
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
