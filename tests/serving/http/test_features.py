"""What else vLLM can do with a request, under adapters: every answer is as PEFT's.

There are fewer slots than adapters, and requests of adapters that fail are in the same batches.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from tests.attacks.poison import poisoned

from ..engine import (
    BLOCK_SIZE,
    TAKES_LOGITS_PROCESSORS,
    assert_as_peft,
    greedy,
    lora_request,
    loras_of,
    needs_draft_models,
    needs_drafts,
    needs_ngram_drafts,
    running_engine,
)
from ..models.cases import NEW_TOKENS, Case, Scenario
from ..models.peft_reference import PeftReference
from ..models.recipes import EMBEDDING_RECIPE, LINEAR_RECIPES
from ..models.tiny_models import VOCAB_SIZE, write_eagle, write_llama

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.serving

NAMES = (LINEAR_RECIPES[0].name, LINEAR_RECIPES[3].name, EMBEDDING_RECIPE.name)
LENGTH = 23
"""Tokens of a prompt: with its answer it needs a second block of the KV cache."""
BLOCKS = 12


@pytest.fixture(scope="module")
def cases(llama: Scenario) -> list[Case]:
    """One for the base model and for each of some adapters."""
    return [
        next(case for case in llama.cases_of(name) if len(case.prompt) == LENGTH)
        for name in (None, *NAMES)
    ]


def forbidding() -> type:
    """A logits processor of a user's own, of the running model runner's kind; few ask for it."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        with contextlib.suppress(ImportError):  # before vLLM 0.33, both runners take one kind
            return _forbidding_of_the_second_runner()
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forbidding(AdapterLogitsProcessor):
        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: "SamplingParams") -> Any:
            token = (params.extra_args or {}).get("forbidden")
            if token is None:
                return None
            return lambda output, logits: logits.index_fill(0, torch.tensor([token]), float("-inf"))

    return Forbidding


def _forbidding_of_the_second_runner() -> type:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class Forbidding(LogitsProcessor):
        def __init__(self, vllm_config: Any, req_states: Any) -> None:
            self._tokens: dict[int, int | None] = {}

        def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
            token = (sampling_params.extra_args or {}).get("forbidden")
            self._tokens[req_idx] = token
            return token is not None

        def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
            for row, request in enumerate(ctx.expanded_idx_mapping.tolist()):
                if (token := self._tokens.get(request)) is not None:
                    logits[row, token] = float("-inf")
            return logits

    return Forbidding


@pytest.fixture(scope="module")
def engine(llama: Scenario) -> "Iterator[LLM]":
    with running_engine(
        llama.base,
        in_process=True,
        max_loras=2,
        skip_tokenizer_init=False,
        scheduling_policy="priority",
        max_num_batched_tokens=64,  # a part of the prompts each step
        num_gpu_blocks_override=BLOCKS,
        disable_log_stats=False,
        logits_processors=[forbidding()] if TAKES_LOGITS_PROCESSORS else None,
    ) as llm:
        yield llm


def prompts_of(cases: Sequence[Case]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": list(case.prompt)} for case in cases]


_numbers = count(90)


@pytest.fixture
def failing(llama: Scenario, tmp_path: Path) -> "list[LoRARequest]":
    """An adapter that overflows in use, and one whose files are not there; new in each test."""
    from vllm.lora.request import LoRARequest

    first, second = next(_numbers), next(_numbers)
    source = llama.adapters[NAMES[0]]
    poison = poisoned(source, tmp_path / "poison", "float32", number=first)
    return [
        LoRARequest(f"poison{first}", first, str(poison)),
        LoRARequest(f"gone{second}", second, str(tmp_path / "gone")),
    ]


def generate(
    llm: "LLM",
    llama: Scenario,
    cases: Sequence[Case],
    failing: "Sequence[LoRARequest]",
    parameters: "SamplingParams | list[SamplingParams]",
    **options: Any,
) -> "list[RequestOutput]":
    """The outputs of the cases. The failing adapters' requests, a part of the batch, all fail."""
    if isinstance(parameters, list):
        parameters = [*parameters[: len(failing)], *parameters]
    outputs = llm.generate(
        prompts_of([*cases[: len(failing)], *cases]),
        parameters,
        lora_request=[*failing, *loras_of(llama, cases)],
        use_tqdm=False,
        **options,
    )
    for output, adapter in zip(outputs, failing, strict=False):
        reasons = {completion.finish_reason for completion in output.outputs}
        assert reasons == {"error"}, adapter.lora_name
    return outputs[len(failing) :]


def decisive(
    base: Path, adapters: Mapping[str, Path], prompts: Sequence[tuple[int, ...]]
) -> list[Case]:
    """PEFT's answers for each adapter and the base model, as far as none hangs on rounding."""
    truth = PeftReference(base, adapters)
    answers = {name: truth.generate(name, prompts, NEW_TOKENS) for name in (None, *adapters)}
    found = [
        Case(name, prompt, of[row])
        for row, prompt in enumerate(prompts)
        for name, of in answers.items()
        if of[row].min_margin > 0.01
    ]
    assert {case.adapter for case in found} == {None, *adapters}
    return found


def counter(llm: "LLM", name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


@pytest.mark.smoke("text generation", "chunked prefill", "n > 1", "`embed_tokens` and `lm_head`")
def test_each_of_several_answers_is_pefts(
    engine: "LLM", llama: Scenario, cases: list[Case], failing: "list[LoRARequest]"
) -> None:
    # vLLM draws one answer if there is no temperature.
    parameters = greedy(n=3, temperature=1.0, top_k=1)
    outputs = generate(engine, llama, cases, failing, parameters)
    for output, case in zip(outputs, cases, strict=True):
        tokens = [tuple(completion.token_ids) for completion in output.outputs]
        assert tokens == [case.expected.tokens] * 3, case.adapter


def test_a_seed_draws_the_same_tokens_however_its_prompt_is_divided(
    engine: "LLM", llama: Scenario, cases: list[Case], failing: "list[LoRARequest]"
) -> None:
    """The engine lives on, too: on CPUs, vLLM's own dies of a divided prompt with a seed."""
    parameters = greedy(temperature=1.0, seed=7)
    long = [replace(case, prompt=case.prompt * 3) for case in cases]  # more than a step takes in
    together = generate(engine, llama, long * 2, failing, parameters)
    # By now the first blocks of each prompt are cached: it is divided no more.
    alone = [generate(engine, llama, [case], [], parameters)[0] for case in long]
    tokens = [output.outputs[0].token_ids for output in alone]
    assert [output.outputs[0].token_ids for output in together] == tokens * 2
    assert len(set(map(tuple, tokens))) == len(cases)


@pytest.mark.smoke("priorities", "preemption")
def test_requests_that_are_preempted_and_go_first_answer_as_peft(
    engine: "LLM", llama: Scenario, cases: list[Case], failing: "list[LoRARequest]"
) -> None:
    """The KV cache has room for half of what the requests need in the end."""
    before = counter(engine, "vllm:num_preemptions")
    many = cases * 4
    priority = [-i for i in range(len(failing) + len(many))]
    outputs = generate(engine, llama, many, failing, greedy(), priority=priority)
    assert_as_peft(outputs, many)
    assert counter(engine, "vllm:num_preemptions") > before


@pytest.mark.smoke("beam search")
def test_one_beam_is_pefts_answer_and_more_find_none_worse(
    engine: "LLM", llama: Scenario, cases: list[Case], failing: "list[LoRARequest]"
) -> None:
    from vllm.sampling_params import BeamSearchParams

    def search(width: int) -> list[Any]:
        """By the cases; a failing adapter's search ends without a token."""
        outputs = engine.beam_search(
            prompts_of([*cases[: len(failing)], *cases]),
            BeamSearchParams(beam_width=width, max_tokens=4, ignore_eos=True),
            lora_request=[*failing, *loras_of(llama, cases)],
        )
        for output in outputs[: len(failing)]:
            assert not any(beam.tokens for beam in output.sequences)
        return outputs[len(failing) :]

    for one, three, case in zip(search(1), search(3), cases, strict=True):
        assert tuple(one.sequences[0].tokens[LENGTH:]) == case.expected.tokens[:4], case.adapter
        likelihood = sum(case.expected.logprobs[:4])
        assert one.sequences[0].cum_logprob == pytest.approx(likelihood, abs=2e-3)
        assert three.sequences[0].cum_logprob >= likelihood - 2e-3


@pytest.mark.smoke("structured outputs")
def test_a_grammar_chooses_among_the_adapters_likeliest_tokens(
    engine: "LLM", llama: Scenario, cases: list[Case], failing: "list[LoRARequest]"
) -> None:
    """Beside a request without one: its answer stays PEFT's."""
    from vllm.sampling_params import StructuredOutputsParams

    def likeliest(case: Case) -> list[int]:
        return list(case.expected.top[0])

    parameters = [
        greedy(
            max_tokens=1,
            structured_outputs=StructuredOutputsParams(
                choice=[f"t{token}" for token in sorted(likeliest(case)[2:4])]
            ),
        )
        for case in cases
    ]
    parameters += [greedy()] * len(cases)
    outputs = generate(engine, llama, [*cases, *cases], failing, parameters)
    for output, case in zip(outputs, cases, strict=False):
        assert list(output.outputs[0].token_ids) == [likeliest(case)[2]], case.adapter
    assert_as_peft(outputs[len(cases) :], cases)


def test_what_a_requests_parameters_make_of_sound_numbers_quarantines_nobody(
    engine: "LLM", llama: Scenario, cases: list[Case], failing: "list[LoRARequest]"
) -> None:
    """Nor does it end the quarantine for what the base model makes: who overflows still fails."""
    parameters = greedy(allowed_token_ids=[1, 2], repetition_penalty=1e-300)
    for asked in (cases[1:], cases[:1]):
        outputs = generate(engine, llama, asked, [], parameters)
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    assert_as_peft(generate(engine, llama, cases, failing, greedy()), cases)


def test_tokens_that_there_are_not_cannot_be_allowed(
    engine: "LLM", llama: Scenario, cases: list[Case]
) -> None:
    with pytest.raises(Exception, match="out-of-vocab"):
        engine.generate(
            prompts_of(cases[1:2]),
            greedy(allowed_token_ids=[VOCAB_SIZE]),
            lora_request=loras_of(llama, cases[1:2]),
            use_tqdm=False,
        )


def test_adapters_that_take_turns_over_one_prefix_keep_their_own_cache_of_it(
    engine: "LLM", llama: Scenario, failing: "list[LoRARequest]"
) -> None:
    """In parts, and with a KV cache that has room for a part of them, time after time."""
    prefix = tuple(7 * number % 97 + 1 for number in range(2 * BLOCK_SIZE))
    prompts = [(*prefix, *(tail + 3 * number for number in range(9))) for tail in range(4)]
    many = decisive(llama.base, {name: llama.adapters[name] for name in NAMES}, prompts)
    cached = 0
    for _ in range(3):
        outputs = generate(engine, llama, many, failing, greedy())
        assert_as_peft(outputs, many)
        cached += sum(output.num_cached_tokens for output in outputs)
    assert 0 < cached < 3 * len(many) * len(prefix)


@pytest.mark.skipif(
    not TAKES_LOGITS_PROCESSORS, reason="vLLM's second model runner takes none before 0.31"
)
def test_a_logits_processor_of_ones_own_acts_on_its_requests_under_their_adapters(
    engine: "LLM", llama: Scenario, cases: list[Case], failing: "list[LoRARequest]"
) -> None:
    """Beside requests that it leaves as they are: their answers stay PEFT's."""
    ranked = [list(case.expected.top[0]) for case in cases]
    parameters = [
        greedy(max_tokens=1, extra_args={"forbidden": likeliest[0]}) for likeliest in ranked
    ]
    parameters += [greedy()] * len(cases)
    outputs = generate(engine, llama, [*cases, *cases], failing, parameters)
    for output, likeliest in zip(outputs, ranked, strict=False):
        assert list(output.outputs[0].token_ids) == [likeliest[1]]
    assert_as_peft(outputs[len(cases) :], cases)


@pytest.mark.smoke("pinning")
def test_adapters_are_pinned_listed_and_removed(engine: "LLM", llama: Scenario) -> None:
    request = lora_request(llama, NAMES[0])
    assert engine.llm_engine.add_lora(request)
    assert engine.llm_engine.pin_lora(request.lora_int_id)
    assert request.lora_int_id in engine.llm_engine.list_loras()
    assert engine.llm_engine.remove_lora(request.lora_int_id)
    assert request.lora_int_id not in engine.llm_engine.list_loras()


@pytest.mark.smoke("other weights for the base model")
def test_adapters_act_on_the_weights_that_the_base_model_has_got(
    engine: "LLM", llama: Scenario, failing: "list[LoRARequest]", tmp_path: Path
) -> None:
    """And on the first ones when it has those again; adapters are in slots all the while."""
    # Not the one whose file also has the first weights' embedding, which PEFT would load.
    adapters = {recipe.name: llama.adapters[recipe.name] for recipe in LINEAR_RECIPES[:4]}
    bases = [llama.base, write_llama(tmp_path / "other", seed=7)]
    dice = random.Random(5)
    prompts = [tuple(dice.randrange(VOCAB_SIZE) for _ in range(LENGTH)) for _ in range(8)]
    many = [decisive(base, adapters, prompts) for base in bases]
    for turn in (0, 1, 0):
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(bases[turn])})
        engine.reset_prefix_cache()
        outputs = generate(engine, llama, many[turn], failing, greedy())
        assert_as_peft(outputs, many[turn])


@pytest.mark.smoke("`embed_tokens` and `lm_head`")
def test_prompts_that_are_embeddings_leave_each_adapters_embedding_to_its_requests(
    llama: Scenario, cases: list[Case]
) -> None:
    embedding = load_file(llama.base / "model.safetensors")["model.embed_tokens.weight"]
    many = cases * 2  # once in their slots, they are in the same steps
    prompts = [
        {"prompt_embeds": embedding[list(case.prompt)]}
        if case.adapter != EMBEDDING_RECIPE.name
        else prompts_of([case])[0]
        for case in many
    ]
    with running_engine(
        llama.base, in_process=True, enable_prompt_embeds=True, max_num_batched_tokens=64
    ) as llm:
        for _ in range(2):
            outputs = llm.generate(
                prompts, greedy(), lora_request=loras_of(llama, many), use_tqdm=False
            )
            assert_as_peft(outputs, many)


def ngram(llama: Scenario, path: Path) -> dict[str, Any]:
    # What is looked up has one token, which random prompts of 300 words do repeat.
    return {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 2}


def small_model(llama: Scenario, path: Path) -> dict[str, Any]:
    """The base model itself, no smaller: it does guess what some adapters say."""
    return {"method": "draft_model", "model": str(llama.base)}


def eagle(llama: Scenario, path: Path) -> dict[str, Any]:
    """Shares the embedding and the head, which one of the adapters has changed."""
    return {"method": "eagle", "model": str(write_eagle(path, llama.base))}


@needs_drafts
@pytest.mark.parametrize(
    "drafter",
    [
        pytest.param(
            ngram, marks=[needs_ngram_drafts, pytest.mark.smoke("speculative decoding (ngram)")]
        ),
        pytest.param(
            small_model,
            marks=[
                needs_draft_models,
                pytest.mark.smoke("speculative decoding (draft model)"),
            ],
        ),
        pytest.param(eagle, marks=pytest.mark.smoke("speculative decoding (EAGLE)")),
    ],
)
def test_drafted_tokens_are_verified_under_their_adapter(
    llama: Scenario,
    cases: list[Case],
    failing: "list[LoRARequest]",
    drafter: Callable[[Scenario, Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    with running_engine(
        llama.base,
        in_process=True,
        max_loras=2,
        speculative_config={**drafter(llama, tmp_path / "drafter"), "num_speculative_tokens": 3},
        disable_log_stats=False,
    ) as llm:
        outputs = generate(llm, llama, cases, failing, greedy())
        drafts = counter(llm, "vllm:spec_decode_num_drafts")
        accepted = counter(llm, "vllm:spec_decode_num_accepted_tokens")
        # These are drawn, if only from the likeliest; and steps that end prompts have no drafts.
        drawn = generate(llm, llama, cases, [], greedy(temperature=1.0, top_k=1))
    assert_as_peft(outputs, cases)
    assert_as_peft(drawn, cases)
    assert drafts > 0
    assert accepted > 0 or drafter is not small_model


@pytest.mark.skipif(
    os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1",
    reason="on CPUs, vLLM's first model runner cannot be ahead of its answers",
)
@pytest.mark.smoke("quarantine")
def test_steps_that_are_scheduled_before_answers_are_known_answer_as_peft(
    llama: Scenario,
    cases: list[Case],
    failing: "list[LoRARequest]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on GPUs, where who overflows is in one more step already when that is noticed.

    The last test: its engine takes the groups of this process with it, which the others' needs.
    """
    from vllm.platforms.cpu import CpuPlatform

    complete = CpuPlatform.check_and_update_config

    def schedule_ahead(config: Any) -> None:
        complete(config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(schedule_ahead))
    many = [*cases * 3]
    with running_engine(
        llama.base,
        in_process=True,
        max_loras=2,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=BLOCKS,
    ) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        outputs = generate(llm, llama, many, failing, greedy())
    assert_as_peft(outputs, many)
