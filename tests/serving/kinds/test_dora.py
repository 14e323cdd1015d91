"""DoRA adapters answer as in PEFT, whatever else is in the batch."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ..bases.test_parity import assert_as_peft
from ..engine import answer, generate, lora_request, loras_of, prompt_logprobs, running_engine
from ..models.cases import Case, Scenario

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

DORA = {"multilora": {"dora": True}}
# Of a prompt's log-probabilities, against those in float32. Seen: 0.13 to 0.20, of PEFT in bfloat16
# 0.13 to 0.25, of the base model 0.15; between an adapter and the base model 4 and more.
BFLOAT16_RMS = 0.3


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    from ..models.scenarios import dora_scenario

    return dora_scenario(tmp_path_factory.mktemp("dora"))


@pytest.fixture(scope="module")
def engine(dora: Scenario) -> "Iterator[LLM]":
    """Fewer slots than adapters, and parts of prompts in each step."""
    with running_engine(
        dora.base,
        in_process=True,
        max_loras=2,
        max_num_batched_tokens=24,
        enable_prefix_caching=False,
        additional_config=DORA,
    ) as llm:
        yield llm


def assert_all_as_peft(llm: "LLM", scenario: Scenario, cases: Sequence[Case]) -> None:
    assert_as_peft(list(zip(answer(llm, scenario, cases), cases, strict=True)))


def shuffled(cases: Sequence[Case], seed: int) -> list[Case]:
    cases = list(cases)
    random.Random(seed).shuffle(cases)
    return cases


def known_factors(worker: Any) -> int:
    return len(worker.model_runner.lora_manager.model_manager.factors._known)


def no_more_lengths(worker: Any) -> None:
    """From now on lengths of rows cannot be found."""

    def never(*_: Any) -> None:
        raise AssertionError("lengths were found again")

    worker.model_runner.lora_manager.model_manager.factors._finish = never


def lengths_again(worker: Any) -> None:
    del worker.model_runner.lora_manager.model_manager.factors._finish


def weights_replaced(worker: Any) -> None:
    """What vLLM does when the base model has got other weights."""
    worker.model_runner.reset_lora_state()


@pytest.mark.smoke("DoRA")
def test_mixed_batches_answer_as_peft_with_evictions_and_chunks(
    engine: "LLM", dora: Scenario
) -> None:
    cases = shuffled(dora.cases, seed=1)
    names = {case.adapter for case in cases}
    assert {None, "activated", "all-linear-r8", "dora-all-r8", "dora-max-rank-r64"} <= names
    assert_all_as_peft(engine, dora, cases)


def test_an_adapter_that_comes_back_costs_no_lengths(engine: "LLM", dora: Scenario) -> None:
    kinds = [name for name in dora.adapters if name.startswith("dora")]
    cases = [dora.cases_of(name)[0] for name in kinds]
    assert_all_as_peft(engine, dora, cases)
    assert engine.collective_rpc(known_factors) == [len(kinds)]
    engine.collective_rpc(no_more_lengths)
    try:
        assert_all_as_peft(engine, dora, shuffled(cases, seed=2))
    finally:
        engine.collective_rpc(lengths_again)


@pytest.mark.smoke("DoRA")
def test_an_idle_ranks_batches_cost_no_lengths(engine: "LLM", dora: Scenario) -> None:
    """While others work, vLLM has it compute such batches, with adapters that there are not."""
    kinds = [name for name in dora.adapters if name.startswith("dora")][:2]
    cases = [dora.cases_of(name)[0] for name in kinds]
    assert_all_as_peft(engine, dora, cases)
    known = engine.collective_rpc(known_factors)
    engine.collective_rpc(no_more_lengths)
    try:
        engine.collective_rpc("execute_dummy_batch")
        assert engine.collective_rpc(known_factors) == known
        assert_all_as_peft(engine, dora, cases)
    finally:
        engine.collective_rpc(lengths_again)


def test_factors_are_found_again_when_the_base_model_has_other_weights(
    engine: "LLM", dora: Scenario
) -> None:
    cases = [case for case in dora.cases if case.adapter == "dora-all-r8"]
    assert_all_as_peft(engine, dora, cases)
    engine.collective_rpc("execute_dummy_batch")  # which changes no weights
    engine.collective_rpc(weights_replaced)
    assert engine.collective_rpc(known_factors) == [0]
    assert_all_as_peft(engine, dora, cases)
    assert engine.collective_rpc(known_factors) == [1]


def test_a_row_without_length_takes_its_adapter_out_of_service_alone(
    engine: "LLM", dora: Scenario, tmp_path: Path
) -> None:
    """PEFT divides by zero there, too."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    source = dora.adapters["dora-up-only-r8"]
    tensors = load_file(source / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}"
    model = AutoModelForCausalLM.from_pretrained(dora.base, dtype=torch.float32)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    # The first row's update is the row itself, with the other sign; its scaling is 2.
    a, b = tensors[name.format("A.weight")], tensors[name.format("B.weight")]
    a[0], b[0] = weight[0], torch.zeros_like(b[0])
    b[0, 0] = -0.5
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = (source / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    case = next(case for case in dora.cases if case.adapter == "dora-all-r8")
    loras = [
        LoRARequest("without-length", 99, str(tmp_path)),
        lora_request(dora, "dora-all-r8"),
    ]
    bad, good = generate(engine, [case.prompt] * 2, loras)
    assert bad.outputs[0].finish_reason == "error"
    assert "not finite" in str(bad.outputs[0].stop_reason)
    assert tuple(good.outputs[0].token_ids) == case.expected.tokens


@pytest.mark.smoke("DoRA with TP 2")
def test_two_workers_answer_as_peft(dora: Scenario) -> None:
    with running_engine(
        dora.base, max_loras=2, tensor_parallel_size=2, additional_config=DORA
    ) as llm:
        assert_all_as_peft(llm, dora, shuffled(dora.cases[1::2], seed=3))


def test_log_probabilities_in_bfloat16(dora: Scenario) -> None:
    from ..models.peft_reference import PeftReference

    names = [None, *(name for name in dora.adapters if name.startswith("dora"))]
    cases = [next(c for c in dora.cases_of(name) if len(c.prompt) == 40) for name in names]
    reference = PeftReference(dora.base, dora.adapters)
    with running_engine(
        dora.base, in_process=True, dtype="bfloat16", additional_config=DORA
    ) as llm:
        prompts = [case.prompt for case in cases]
        loras = loras_of(dora, cases)
        outputs = generate(llm, prompts, loras, max_tokens=1, prompt_logprobs=0)
    errors = {}
    for output, case in zip(outputs, cases, strict=True):
        expected = reference.prompt_logprobs(case.adapter, case.prompt)
        errors[case.adapter] = (prompt_logprobs(output) - expected).square().mean().sqrt().item()
    assert max(errors.values()) < BFLOAT16_RMS, errors
