"""Activated adapters answer as in PEFT, whatever else is in the batch, and share prefixes."""

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ..engine import generate, greedy, loras_of, needs_drafts, needs_ngram_drafts, running_engine
from ..models.activated_models import CHUNK, RECIPES, TWIN, invocation_of
from ..models.cases import Case, Scenario

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

pytestmark = pytest.mark.serving

BLOCK = 32
NAMES = tuple(recipe.name for recipe in RECIPES)


@pytest.fixture(scope="module")
def roomy(activated: Scenario) -> "Iterator[LLM]":
    """Room for long prompts, and for everything in the prefix cache."""
    with running_engine(
        activated.base, in_process=True, max_loras=2, max_model_len=2304, disable_log_stats=False
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def engine(activated: Scenario) -> "Iterator[LLM]":
    """Fewer slots than adapters, parts of prompts in each step, and few blocks."""
    with running_engine(
        activated.base,
        in_process=True,
        max_loras=2,
        max_num_batched_tokens=CHUNK,
        num_gpu_blocks_override=9,
        disable_log_stats=False,
    ) as llm:
        yield llm


def ask(
    llm: "LLM", activated: Scenario, cases: Sequence[Case], **options: Any
) -> "list[RequestOutput]":
    prompts, loras = [case.prompt for case in cases], loras_of(activated, cases)
    return generate(llm, prompts, loras, **options)


def assert_as_peft(outputs: "Sequence[RequestOutput]", cases: Sequence[Case]) -> None:
    wrong = [
        (case.adapter, completion.token_ids, completion.stop_reason)
        for output, case in zip(outputs, cases, strict=True)
        for completion in output.outputs
        if tuple(completion.token_ids) != case.expected.tokens
    ]
    assert not wrong, f"{len(wrong)} answers of {len(cases)} cases are wrong: {wrong}"


def invoking(activated: Scenario) -> list[Case]:
    """The cases of activated adapters: shape after shape."""
    return [case for case in activated.cases if case.adapter in NAMES]


def counter(llm: "LLM", name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


@pytest.mark.smoke("activated LoRA")
def test_mixed_batches_answer_as_peft_with_evictions_and_preemptions(
    engine: "LLM", activated: Scenario
) -> None:
    cases = list(activated.cases)
    random.Random(1).shuffle(cases)
    assert {case.adapter for case in cases} == {None, TWIN, *NAMES}
    before = counter(engine, "vllm:num_preemptions")
    assert_as_peft(ask(engine, activated, cases), cases)
    assert counter(engine, "vllm:num_preemptions") > before


def test_answers_are_the_same_from_cached_prefixes(roomy: "LLM", activated: Scenario) -> None:
    assert_as_peft(ask(roomy, activated, activated.cases), activated.cases)
    outputs = ask(roomy, activated, activated.cases)
    assert_as_peft(outputs, activated.cases)
    for output, case in zip(outputs, activated.cases, strict=True):
        assert output.num_cached_tokens == (len(case.prompt) - 1) // BLOCK * BLOCK


def test_each_of_several_answers_is_pefts(engine: "LLM", activated: Scenario) -> None:
    cases = invoking(activated)[::2]
    assert_as_peft(ask(engine, activated, cases, n=2, temperature=1.0, top_k=1), cases)


def test_prompts_tokens_are_scored_by_the_base_model_before_the_invocation(
    engine: "LLM", activated: Scenario
) -> None:
    from ..models.peft_reference import PeftReference

    reference = PeftReference(activated.base, activated.adapters)
    cases = invoking(activated)[:12]
    outputs = ask(engine, activated, cases, prompt_logprobs=0)
    assert_as_peft(outputs, cases)
    for output, case in zip(outputs, cases, strict=True):
        reference.generate(case.adapter, [case.prompt], 1)  # chooses the adapter
        with torch.inference_mode():
            logits = reference.logits(case.adapter, torch.tensor([case.prompt]))[0]
        expected = torch.log_softmax(logits, dim=-1)
        found = output.prompt_logprobs
        assert found is not None
        assert len(found) == len(case.prompt)
        for place in range(1, len(case.prompt)):
            token = case.prompt[place]
            scored = found[place][token].logprob
            assert scored == pytest.approx(expected[place - 1, token].item(), abs=2e-3), place


def test_a_prompt_without_the_invocation_fails_alone_and_names_it(
    engine: "LLM", activated: Scenario
) -> None:
    sound = next(case for case in activated.cases if case.adapter == "check")
    part = Case("check", (*range(40), *invocation_of("check")[:-1]), sound.expected)
    outputs = ask(engine, activated, [part, sound])
    assert_as_peft(outputs[1:], [sound])
    (failed,) = outputs[0].outputs
    assert failed.finish_reason == "error"
    assert not failed.token_ids
    assert "adapter 'check' is activated by the tokens [250, 17, 251]," in failed.stop_reason


def test_context_is_computed_once_for_six_activated_adapters_and_the_base_model(
    roomy: "LLM", activated: Scenario
) -> None:
    """Two of them under two names each; and a plain one, which shares nothing."""
    from vllm.lora.request import LoRARequest

    source = random.Random(2)
    context = [source.randrange(240) for _ in range(2000)]
    tail = [3, 1, 4, 1, 5]
    adapters = [*NAMES, "check", "judge"]
    loras = [
        LoRARequest(f"{name}-{number}", 100 + number, str(activated.adapters[name]))
        for number, name in enumerate(adapters)
    ]

    def computed(prompt: list[int], lora: Any) -> int:
        (output,) = generate(roomy, [prompt], [lora])
        assert output.outputs[0].finish_reason == "length", output.outputs[0].stop_reason
        return len(prompt) - output.num_cached_tokens

    def prompt_of(name: str) -> list[int]:
        return [*context, *invocation_of(name), *tail]

    shared = len(context) // BLOCK * BLOCK
    counted = counter(roomy, "vllm:prefix_cache_hits")
    assert computed(prompt_of("check"), loras[0]) == len(prompt_of("check"))
    for name, lora in zip(adapters[1:4], loras[1:4], strict=True):
        assert computed(prompt_of(name), lora) == len(prompt_of(name)) - shared
    # The same weights under another name: also what the adapter has computed itself.
    for name, lora in zip(adapters[4:], loras[4:], strict=True):
        same = (len(prompt_of(name)) - 1) // BLOCK * BLOCK
        assert computed(prompt_of(name), lora) == len(prompt_of(name)) - same
    assert computed([*context, 7, 8, 9], None) == len(context) + 3 - shared
    assert counter(roomy, "vllm:prefix_cache_hits") - counted >= 6 * shared
    # From the base model's blocks, too.
    other = context[::-1]
    assert computed([*other, 7], None) == len(other) + 1
    prompt = [*other, *invocation_of("judge"), *tail]
    assert computed(prompt, loras[2]) == len(prompt) - shared
    twin = LoRARequest("twin", 200, str(activated.adapters[TWIN]))
    assert computed(prompt_of("check"), twin) == len(prompt_of("check"))


@pytest.mark.parametrize(("before", "after"), [("check", TWIN), (TWIN, "check")])
def test_a_prompt_that_begins_again_is_not_activated_where_the_version_before_was(
    engine: "LLM", activated: Scenario, tmp_path: Path, before: str, after: str
) -> None:
    """Workers remember where. Nor does the base model find what an adapter has computed."""
    from vllm.lora.request import LoRARequest

    invoked = [case for case in invoking(activated) if case.adapter == "check"]
    late = {case.prompt for case in invoked if _active_from(case) > BLOCK}
    alone = next(case for case in activated.cases_of(None) if case.prompt in late)
    folder = tmp_path / "changing"
    lora = LoRARequest("changing", 300, str(folder), load_inplace=True)
    core = engine.llm_engine
    assert core.reset_prefix_cache()
    shutil.copytree(activated.adapters[before], folder)
    assert core.add_lora(lora)
    prompt = {"prompt_token_ids": list(alone.prompt)}
    core.add_request("r", prompt, greedy(), lora_request=LoRARequest("changing", 300, str(folder)))
    scheduler = core.engine_core.engine_core.scheduler
    while not any(request.num_computed_tokens for request in scheduler.running):
        assert not core.step()
    assert core.reset_prefix_cache(reset_running_requests=True)
    shutil.rmtree(folder)
    shutil.copytree(activated.adapters[after], folder)
    assert core.add_lora(lora)
    outputs = []
    while core.has_unfinished_requests():
        outputs += core.step()
    (answer,) = outputs[-1].outputs
    assert answer.finish_reason == "error"
    assert "was reloaded while this request waited" in answer.stop_reason
    assert_as_peft(ask(engine, activated, [alone]), [alone])


@needs_drafts
@needs_ngram_drafts
@pytest.mark.smoke("activated LoRA with TP 2 and drafted tokens")
def test_two_ranks_verify_drafted_tokens_as_peft(activated: Scenario) -> None:
    drafter = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 2,
    }
    with running_engine(
        activated.base,
        max_loras=2,
        tensor_parallel_size=2,
        speculative_config=drafter,
        disable_log_stats=False,
    ) as llm:
        cases = activated.cases[::4]
        assert_as_peft(ask(llm, activated, cases), cases)
        assert counter(llm, "vllm:spec_decode_num_drafts") > 0


def _active_from(case: Case) -> int:
    """Where the last invocation in a prompt begins."""
    assert case.adapter is not None
    tokens = invocation_of(case.adapter)
    places = range(len(case.prompt) - len(tokens), -1, -1)
    return next(at for at in places if case.prompt[at : at + len(tokens)] == tokens)
