"""An adapter that overflows in use changes nobody else's answers, however its requests end.

Every combination is tried with MULTILORA_TEST_POISON=all; otherwise two that differ in all. vLLM's
attention on CPUs has blocks of 32 tokens and multiples of it.
"""

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.serving.engine import answer, assert_as_peft, running_engine
from tests.serving.models.cases import Case, Scenario

from .poison import ATTACKS, LENGTH, NAME, Attacker, assert_quarantined, poisoned

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

pytestmark = pytest.mark.serving

SOURCE = "customer-1"
OTHERS = (None, *(f"customer-{i}" for i in range(2, 26)))
"""Twenty-five, who are asked after each of four attacks: a hundred answers."""

AMX_ATOL = 0.5
"""Tolerance for 16-bit log probabilities: 0.24 was seen; NaN and other weights move them more."""

ALL = tuple(
    itertools.product(("float32", "bfloat16", "float16"), (32, 128), (True, False), (48, 512))
)
FEW = (("float32", 32, False, 48), ("bfloat16", 128, True, 48))
CHOSEN = ALL if os.environ.get("MULTILORA_TEST_POISON") == "all" else FEW


def _id(setting: tuple[str, int, bool, int]) -> str:
    dtype, block, prefixes, tokens = setting
    kind = "chunks" if tokens < LENGTH else "whole"
    return f"{dtype}-block-{block}-{'prefixes' if prefixes else 'no-prefixes'}-{kind}"


@pytest.fixture(scope="module", params=CHOSEN, ids=_id)
def setting(request: pytest.FixtureRequest) -> tuple[str, int, bool, int]:
    found: tuple[str, int, bool, int] = request.param
    return found


@pytest.fixture(scope="module")
def engine(fleet: Scenario, setting: tuple[str, int, bool, int]) -> Iterator["LLM"]:
    dtype, block, prefixes, tokens = setting
    # Few blocks, so that those of the attacker go round.
    with running_engine(
        fleet.base,
        in_process=True,  # attacks look at the scheduler
        dtype=dtype,
        block_size=block,
        enable_prefix_caching=prefixes,
        max_loras=4,
        max_cpu_loras=40,
        num_gpu_blocks_override=16 * 128 // block,
        max_num_batched_tokens=tokens,
        max_num_seqs=8,
    ) as llm:
        yield llm


def same(dtype: str, before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """To the bit; with AMX, whose products of 16-bit numbers round by the rows of a step, nearly.

    Then it is the first token's likeliest that count: what comes after may be of another token.
    """
    if dtype == "float32" or not torch.cpu._is_amx_tile_supported():
        return before == after
    ranked = [sorted(x for _, x in logprobs[0]) for _, logprobs in (before, after)]
    return ranked[0] == pytest.approx(ranked[1], abs=AMX_ATOL)


def answers(llm: "LLM", fleet: Scenario, cases: list[Case]) -> list[tuple[Any, ...]]:
    """Tokens and their log probabilities, to the bit; nothing is left in the prefix cache."""
    assert llm.llm_engine.reset_prefix_cache()
    return [_exact(output) for output in answer(llm, fleet, cases)]


def _exact(output: "RequestOutput") -> tuple[Any, ...]:
    completion = output.outputs[0]
    assert completion.finish_reason == "length", completion
    logprobs = [[(t, x.logprob) for t, x in step.items()] for step in completion.logprobs or ()]
    assert all(math.isfinite(x) for step in logprobs for _, x in step)
    return tuple(completion.token_ids), logprobs


def test_nobody_elses_answer_changes(
    engine: "LLM", fleet: Scenario, setting: tuple[str, int, bool, int], tmp_path: Path
) -> None:
    """A hundred answers after four kinds of attack, each with weights of its own."""
    dtype, _, _, tokens = setting
    cases = [fleet.cases_of(name)[0] for name in OTHERS]
    before = answers(engine, fleet, cases)
    if dtype == "float32":
        assert [tokens for tokens, _ in before] == [case.expected.tokens for case in cases]
    changed = {}
    attacks = ATTACKS if tokens < LENGTH else ATTACKS[:1] * len(ATTACKS)
    for number, attack in enumerate(attacks):
        adapter = poisoned(fleet.adapters[SOURCE], tmp_path / f"{number}", dtype, number)
        attack(Attacker(engine, adapter, 1000 + number))
        after = answers(engine, fleet, cases)
        wrong = [
            c.adapter for c, a, b in zip(cases, before, after, strict=True) if not same(dtype, a, b)
        ]
        if wrong:
            changed[f"{number} {attack.__name__}"] = wrong
    assert not changed


@pytest.mark.smoke("quarantine")
def test_a_quarantined_adapter_is_shown_and_serves_again_with_other_weights(
    engine: "LLM", fleet: Scenario, setting: tuple[str, int, bool, int], tmp_path: Path
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = poisoned(fleet.adapters[SOURCE], tmp_path / NAME, setting[0], 30)
    for output in Attacker(engine, adapter, 3000).ask(length=20):
        assert_quarantined(output)
    [report] = engine.collective_rpc("multilora_adapter_status", args=([],))
    [row] = [row for row in report["adapters"] if row["int_id"] == 3000]
    assert row["state"] == "quarantined"
    assert "not finite" in row["last_error"]
    assert engine.llm_engine.remove_lora(3000)
    case = fleet.cases_of(SOURCE)[0]
    [output] = engine.generate(
        [{"prompt_token_ids": list(case.prompt)}],
        SamplingParams(
            temperature=0.0, max_tokens=len(case.expected.tokens), ignore_eos=True, detokenize=False
        ),
        lora_request=LoRARequest(NAME, 3000, str(fleet.adapters[SOURCE])),
        use_tqdm=False,
    )
    assert output.outputs[0].finish_reason == "length"
    if setting[0] == "float32":
        assert tuple(output.outputs[0].token_ids) == case.expected.tokens


def test_nobody_elses_answer_changes_beside_an_attack(
    engine: "LLM", fleet: Scenario, setting: tuple[str, int, bool, int], tmp_path: Path
) -> None:
    """The attacker's requests in the same steps as the others'."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    dtype = setting[0]
    cases = [fleet.cases_of(name)[0] for name in OTHERS[:12]]
    deployed = dict(fleet.adapters)
    loras: list[Any] = [
        case.adapter
        and LoRARequest(case.adapter, fleet.adapter_id(case.adapter), str(deployed[case.adapter]))
        for case in cases
    ]
    prompts: list[Any] = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    for number in range(4):
        adapter = poisoned(fleet.adapters[SOURCE], tmp_path / f"{number}", dtype, 10 + number)
        loras.insert(3 * number, LoRARequest(f"{NAME}-{number}", 2000 + number, str(adapter)))
        prompts.insert(3 * number, {"prompt_token_ids": [number + 1] * 20})
    outputs = engine.generate(
        prompts,
        SamplingParams(
            temperature=0.0,
            max_tokens=len(cases[0].expected.tokens),
            ignore_eos=True,
            logprobs=5,
            detokenize=False,
        ),
        lora_request=loras,
        use_tqdm=False,
    )
    guilty = [outputs[3 * number] for number in range(4)]
    others = [output for output in outputs if output not in guilty]
    for output in guilty:
        assert_quarantined(output)
    for output in others:
        _exact(output)
    if dtype == "float32":  # others' rounding depends on who is in the batch
        assert_as_peft(others, cases)
