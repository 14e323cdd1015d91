"""An engine answers every request as PEFT does, whatever else is in its batch."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig

from multilora_kernels.native.packed_linear import PackedLinear, pack
from vllm_multilora.metrics.definitions import LOAD_DURATION, REQUEST_WAIT, REQUESTS

from ..engine import BLOCK_SIZE, answer, running_engine
from ..models.cases import PROMPT_LENGTHS, Case, Scenario
from ..models.recipes import LINEAR_RECIPES
from ..models.scenarios import build_scenario
from ..models.tiny_models import write_llama

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

    Answers = Mapping[str | None, Sequence[tuple[RequestOutput, Case]]]

pytestmark = pytest.mark.serving

# Float32 on both sides, other orders of summation: differences seen stay under 1e-4, while the loss
# of one module's delta in one layer moves some log-probability of every scenario by more than 1.
LOGPROB_ATOL = 5e-4

EXACT_SCALES = {"all-linear-r8", "max-rank-r64", "gate-only-r8", "layer1-only-r8"}


def adapter_id(name: str | None) -> str:
    return name or "base"


def answers_by_adapter(llm: "LLM", scenario: Scenario, cases: Sequence[Case]) -> "Answers":
    """Sends the cases as one batch and sorts the outputs by adapter."""
    outputs = answer(llm, scenario, cases)
    pairs = list(zip(outputs, cases, strict=True))
    return {
        name: [pair for pair in pairs if pair[1].adapter == name]
        for name in (None, *scenario.adapters)
    }


def assert_all_as_peft(answers: "Answers") -> None:
    wrong = {}
    for name, pairs in answers.items():
        try:
            assert_as_peft(pairs)
        except AssertionError as error:
            wrong[adapter_id(name)] = str(error)
    assert not wrong


def assert_as_peft(pairs: "Sequence[tuple[RequestOutput, Case]]") -> None:
    """Equal tokens; log-probabilities of the likeliest tokens within ``LOGPROB_ATOL``."""
    assert pairs
    for output, case in pairs:
        completion = output.outputs[0]
        where = f"{adapter_id(case.adapter)}, prompt of {len(case.prompt)} tokens"
        assert tuple(completion.token_ids) == case.expected.tokens, where
        for step, (found, expected) in enumerate(
            zip(completion.logprobs, case.expected.top, strict=True)
        ):
            # By rank, not by token: the last of the top tokens may be a near tie.
            ranked = sorted((entry.logprob for entry in found.values()), reverse=True)
            assert ranked == pytest.approx(list(expected.values()), abs=LOGPROB_ATOL), (
                f"{where}, step {step}"
            )


@pytest.fixture(scope="class")
def llama_engine(llama: Scenario) -> "Iterator[LLM]":
    with running_engine(llama.base, in_process=True) as llm:
        yield llm


@pytest.fixture(scope="class")
def llama_answers(llama_engine: "LLM", llama: Scenario) -> "Answers":
    return answers_by_adapter(llama_engine, llama, llama.cases)


@pytest.fixture(scope="class")
def qwen2_engine(qwen2: Scenario) -> "Iterator[LLM]":
    with running_engine(qwen2.base, in_process=True) as llm:
        yield llm


@pytest.fixture(scope="class")
def qwen2_answers(qwen2_engine: "LLM", qwen2: Scenario) -> "Answers":
    return answers_by_adapter(qwen2_engine, qwen2, qwen2.cases)


def forwards_that_differ(worker: Any) -> tuple[int, list[str]]:
    """How many layers have a forward of the plugin's, and those that it answers otherwise."""
    model, wrong = worker.model_runner.model, []
    shortened = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(vars(type(layer)).get("forward"), staticmethod)
    }
    for name, layer in shortened.items():
        rows = torch.randn(16, layer.input_size, generator=torch.Generator().manual_seed(0))
        for x in (rows, rows[None]):
            (found, bias), (expected, its_bias) = layer(x), super(type(layer), layer).forward(x)
            if not torch.equal(found, expected) or bias is not its_bias:
                wrong.append(name)
    return len(shortened), wrong


def packed_layers(worker: Any) -> set[str]:
    """The kinds of layers whose base products are the C kernels'."""
    modules = worker.model_runner.lora_manager.model_manager.modules
    return {
        name.rpartition(".")[2]
        for name, layer in modules.items()
        if isinstance(getattr(layer.base_layer, "cpu_linear", None), PackedLinear)
    }


@pytest.mark.smoke("text generation", "`embed_tokens` and `lm_head`", "prefix caching")
class TestLlama:
    """Nine adapters over four slots and six host places, prefix caching on."""

    def test_one_mixed_batch_answers_as_peft(self, llama_answers: "Answers") -> None:
        assert_all_as_peft(llama_answers)

    def test_cached_prefixes_are_reused_and_stay_with_their_adapter(
        self, llama_engine: "LLM", llama: Scenario, llama_answers: "Answers"
    ) -> None:
        long = [case for case in llama.cases if case.adapter and len(case.prompt) > BLOCK_SIZE]
        again = answers_by_adapter(llama_engine, llama, long)
        for name in llama.adapters:
            assert_as_peft(again[name])
            assert [output.num_cached_tokens for output, _ in again[name]] == [BLOCK_SIZE]

    def test_an_adapter_is_itself_again_after_each_eviction(
        self, llama_engine: "LLM", llama: Scenario
    ) -> None:
        """One adapter at a time, round and round: each finds its place taken by another."""
        for length in PROMPT_LENGTHS[1:3]:
            for name in llama.adapters:
                case = next(c for c in llama.cases_of(name) if len(c.prompt) == length)
                assert_as_peft([(answer(llama_engine, llama, [case])[0], case)])

    def test_base_requests_stay_base_while_adapters_fill_the_slots(
        self, llama_engine: "LLM", llama: Scenario, llama_answers: "Answers"
    ) -> None:
        cases = llama.cases_of(None)
        assert_as_peft(list(zip(answer(llama_engine, llama, cases), cases, strict=True)))


class TestQwen2:
    """Biases on q, k and v beneath the adapters."""

    def test_one_mixed_batch_answers_as_peft(self, qwen2_answers: "Answers") -> None:
        assert_all_as_peft(qwen2_answers)

    def test_the_short_forward_gives_what_vllms_gives(
        self, qwen2_engine: "LLM", qwen2: Scenario, qwen2_answers: "Answers"
    ) -> None:
        layers = AutoConfig.from_pretrained(qwen2.base).num_hidden_layers
        answer(qwen2_engine, qwen2, qwen2.cases[:3])
        assert qwen2_engine.collective_rpc(forwards_that_differ) == [(4 * layers, [])]

    @pytest.mark.skipif(pack(torch.zeros(64, 64)) is None, reason="no AVX-512")
    def test_base_layers_multiply_by_the_c_kernels(
        self, qwen2_engine: "LLM", qwen2_answers: "Answers"
    ) -> None:
        # All but gate_up_proj, whose outputs are no whole blocks; none with AMX, which vLLM uses.
        amx = torch.cpu._is_amx_tile_supported()
        packed = set() if amx else {"qkv_proj", "o_proj", "down_proj"}
        assert qwen2_engine.collective_rpc(packed_layers) == [packed]


@pytest.mark.parametrize(
    "overrides",
    [
        # 24 tokens a step: a 40-token prompt takes several steps, each shared with decodes.
        # Adapters loaded while the engine waits, as where workers are on other machines.
        pytest.param(
            {
                "max_num_batched_tokens": 24,
                "enable_prefix_caching": False,
                "additional_config": {"multilora": {"async_loading": False}},
            },
            id="chunked-prefill-and-blocking-loads",
        ),
    ],
)
def test_execution_modes_answer_as_peft_and_count_requests(
    llama: Scenario, overrides: dict[str, Any]
) -> None:
    with running_engine(llama.base, disable_log_stats=False, **overrides) as llm:
        assert_all_as_peft(answers_by_adapter(llm, llama, llama.cases))
        metrics = llm.get_metrics()
    asked = Counter(case.adapter for case in llama.cases if case.adapter is not None)
    counted = {m.labels["lora_name"]: m.value for m in metrics if m.name == REQUESTS.name}
    assert counted == asked
    (waits,) = (m for m in metrics if m.name == REQUEST_WAIT.name)
    assert waits.count == sum(asked.values())
    (reads,) = (m for m in metrics if m.name == LOAD_DURATION.name and m.labels["source"] == "disk")
    assert reads.count >= len(asked)


def test_slots_in_bfloat16_answer_in_float32_as_peft(tmp_path: Path) -> None:
    """The adapters' weights, and those times their scales, are numbers that bfloat16 has."""
    recipes = [replace(r, bfloat16=True) for r in LINEAR_RECIPES if r.name in EXACT_SCALES]
    assert len(recipes) == len(EXACT_SCALES)
    scenario = build_scenario(tmp_path, write_llama, recipes, lengths=(7, 23))
    with running_engine(scenario.base, in_process=True, lora_dtype="bfloat16") as llm:
        assert_all_as_peft(answers_by_adapter(llm, scenario, scenario.cases))


def test_ranks_that_wait_for_loads_have_room_for_their_parts(llama: Scenario) -> None:
    """Each has a pack of its own from the store that they share."""
    cases = [case for case in llama.cases if len(case.prompt) == 7][:3]
    with running_engine(
        llama.base,
        max_loras=1,
        max_cpu_loras=1,
        tensor_parallel_size=2,
        additional_config={"multilora": {"async_loading": False, "load_timeout_s": 10}},
    ) as llm:
        assert_as_peft(list(zip(answer(llm, llama, cases), cases, strict=True)))
