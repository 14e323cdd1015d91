"""Blends answer as those that PEFT makes with `combination_type="cat"`, beside all others."""

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

from ..engine import assert_as_peft, generate, prompt_logprobs, running_engine
from ..models.blend_models import BLENDS, BlendScenario, blending_reference
from ..models.cases import Case

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

pytestmark = pytest.mark.serving

CHUNK = 24
# Of the mean over a prompt. The base model itself is 0.23 from float32, plain adapters are up to
# 0.40 and blends up to 0.30, of which scores there are 5 to 7 away without the adapter.
BFLOAT16_ATOL = 0.5


@pytest.fixture(scope="module")
def engine(blends: BlendScenario) -> "Iterator[LLM]":
    """Fewer slots and host places than adapters and blends; parts of prompts in a step."""
    with running_engine(
        blends.base,
        in_process=True,
        max_loras=2,
        max_cpu_loras=3,
        max_num_batched_tokens=CHUNK,
        disable_log_stats=False,
        additional_config={"multilora": {"max_blends": 3}},
    ) as llm:
        yield llm


def ask(llm: "LLM", blends: BlendScenario, cases: Sequence[Case]) -> "list[RequestOutput]":
    prompts = [case.prompt for case in cases]
    return generate(llm, prompts, [blends.request(case.adapter) for case in cases])


def counted(llm: "LLM", name: str) -> dict[str, float]:
    """A metric's values by adapter."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if metric.name == name:
            label = metric.labels.get("lora_name", "")
            found[label] = found.get(label, 0) + metric.value
    return found


def at_most(cases: Sequence[Case], blends: int) -> Iterator[list[Case]]:
    """The cases in batches with few different blends in each."""
    batch: list[Case] = []
    for case in cases:
        names = {each.adapter for each in (*batch, case)} & BLENDS.keys()
        if len(names) > blends:
            yield batch
            batch = []
        batch.append(case)
    yield batch


@pytest.mark.smoke("blends of adapters")
def test_mixed_batches_answer_as_peft_with_evictions(engine: "LLM", blends: BlendScenario) -> None:
    cases = list(blends.cases)
    random.Random(1).shuffle(cases)
    for batch in at_most(cases, 3):
        assert_as_peft(ask(engine, blends, batch), batch)
    evictions = counted(engine, "vllm:lora_adapter_evict")
    assert evictions["__blends__"] > 0
    # Whatever blends there are: one name for all of them.
    requests = counted(engine, "vllm:lora_requests_by_adapter")
    asked = [case.adapter for case in blends.cases if case.adapter in BLENDS]
    assert requests["__blends__"] == len(asked)
    assert requests.keys() == {"__blends__", *blends.adapters}


def test_one_blend_too_many_fails_alone(engine: "LLM", blends: BlendScenario) -> None:
    cases = [blends.cases_of(name)[0] for name in (*BLENDS, "qv-r5")]
    *first, last, plain = ask(engine, blends, cases)
    assert_as_peft([*first, plain], [*cases[:3], cases[-1]])
    (failed,) = last.outputs
    assert failed.finish_reason == "error"
    assert "blends in use at a time (3, " in failed.stop_reason
    assert_as_peft(ask(engine, blends, cases[3:4]), cases[3:4])


def test_a_part_that_is_no_sum_fails_the_blend_and_not_the_others(
    engine: "LLM", blends: BlendScenario
) -> None:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.blends import blended

    case = blends.cases_of("two")[0]
    style = blends.request("qv-r5")
    assert style is not None
    nowhere = blended([(style, 1.0), (LoRARequest("nowhere", 99, "/nowhere"), 1.0)])
    loras = [nowhere, blends.request("two")]
    failed, sound = generate(engine, [case.prompt] * 2, loras)
    assert failed.outputs[0].finish_reason == "error"
    assert "nowhere" in failed.outputs[0].stop_reason
    assert_as_peft([sound], [case])


@pytest.mark.smoke("blends of adapters with TP 2")
def test_two_ranks_that_share_the_rank_answer_as_peft(blends: BlendScenario) -> None:
    with running_engine(
        blends.base,
        max_loras=2,
        tensor_parallel_size=2,
        fully_sharded_loras=True,
        max_num_batched_tokens=CHUNK,
    ) as llm:
        assert_as_peft(ask(llm, blends, blends.cases), blends.cases)


def test_bfloat16_scores_are_near_pefts_in_float32(blends: BlendScenario) -> None:
    """Scores of prompt tokens are as near as the base model's and plain adapters' are."""
    reference = blending_reference(blends.base, blends.adapters)
    names = [None, *blends.adapters, *BLENDS]
    prompts = [blends.cases_of(name)[-1].prompt for name in names]
    with running_engine(blends.base, in_process=True, dtype="bfloat16", max_loras=3) as llm:
        loras = [blends.request(name) for name in names]
        outputs = generate(llm, prompts, loras, max_tokens=1, prompt_logprobs=0)

    apart, effect = {}, {}
    for name, prompt, output in zip(names, prompts, outputs, strict=True):
        exact = reference.prompt_logprobs(name, prompt)
        apart[name] = (prompt_logprobs(output) - exact).abs().mean().item()
        effect[name] = (reference.prompt_logprobs(None, prompt) - exact).abs().mean().item()
    assert max(apart.values()) < BFLOAT16_ATOL, apart
    assert min(effect[name] for name in BLENDS) > 5 * BFLOAT16_ATOL, effect
