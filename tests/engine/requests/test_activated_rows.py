"""Which rows of each step an activated adapter acts on, however prompts are split into steps."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.layers.utils import LoRAMappingType
from vllm.lora.request import LoRARequest

from vllm_multilora.integration.activated import ActivatedLoRARequest, from_token
from vllm_multilora.integration.step.mapping import BatchMapping, base_rows_of
from vllm_multilora.integration.worker.rows.batch_lora_state import BatchLoraState


def lora(number: int, start: int | None = None) -> LoRARequest:
    return from_token(LoRARequest(f"a{number}", number, "/a"), start)


@st.composite
def traffic(draw):
    """Requests, each as adapter, prompt's length and computed tokens; and how each is split."""
    requests = []
    for _ in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 30))
        number = draw(st.integers(0, 3))  # none, a plain one, and two that are activated
        start = draw(st.integers(0, length - 1)) if number > 1 else None
        adapter = lora(number, start) if number else None
        cached = draw(st.integers(0, length - 1))
        total = length + draw(st.integers(0, 6))
        cuts = sorted(draw(st.sets(st.integers(cached + 1, total), max_size=4)) | {total})
        requests.append((adapter, length, cached, cuts))
    return requests


def steps_of(requests):
    """Each step's requests with what they have computed and the tokens that they have in it."""
    for step in range(max(len(cuts) for *_, cuts in requests)):
        batch = []
        for index, (_, _, cached, cuts) in enumerate(requests):
            if step < len(cuts):
                begin = cached if step == 0 else cuts[step - 1]
                batch.append((index, begin, cuts[step] - begin))
        yield batch


def expected(requests, batch) -> list[int]:
    """The adapter of each row: 0 where none acts."""
    rows = []
    for index, begin, count in batch:
        adapter = requests[index][0]
        number = adapter.lora_int_id if adapter else 0
        start = getattr(adapter, "start", 0)
        rows += [number if place >= start else 0 for place in range(begin, begin + count)]
    return rows


def ids_of(requests, batch):
    loras = [requests[index][0] for index, *_ in batch]
    return np.array([each.lora_int_id if each else 0 for each in loras], np.int64)


@settings(deadline=None)
@given(traffic())
def test_rows_before_the_first_activated_token_are_the_base_models(requests):
    for batch in steps_of(requests):
        loras = {str(i): requests[i][0] for i, *_ in batch}
        input_batch = SimpleNamespace(
            req_ids=list(loras),
            num_computed_tokens_cpu=np.array([begin for _, begin, _ in batch], np.int32),
            num_prompt_tokens=np.array([requests[i][1] for i, *_ in batch], np.int32),
            lora_id_to_lora_request={a.lora_int_id: a for a in loras.values() if a},
        )
        states = {name: SimpleNamespace(lora_request=a) for name, a in loras.items()}
        tokens = np.array([count for *_, count in batch], np.int32)
        base = base_rows_of(states, input_batch, tokens)
        ids = ids_of(requests, batch)
        mapping = BatchMapping(ids, tokens, None, LoRAMappingType.LANGUAGE, base)
        assert list(mapping.index_mapping) == expected(requests, batch)
        assert list(mapping.prompt_mapping) == list(ids)  # sampled rows are the adapter's
        assert (base is None) == (expected(requests, batch) == ids.repeat(tokens).tolist())


@settings(deadline=None)
@given(traffic())
def test_so_they_are_in_the_second_model_runner(requests):
    runner = SecondRunner()
    state = BatchLoraState(len(requests))
    state.serve(runner)
    for index, (adapter, *_) in enumerate(requests):
        state.add_request(str(index), index, adapter)
    for batch in steps_of(requests):
        rows = np.array([index for index, *_ in batch])
        computed = np.zeros(len(requests), np.int32)
        computed[rows] = [min(begin, requests[i][1]) for i, begin, _ in batch]
        runner.req_states.num_computed_prefill_tokens = computed
        tokens = np.array([count for *_, count in batch], np.int32)
        _, (mapping,), _ = state.make_lora_inputs([str(i) for i in rows], rows, tokens)
        assert list(mapping.index_mapping) == expected(requests, batch)


class SecondRunner:
    """What a state asks of the second model runner that it is for."""

    def __init__(self) -> None:
        self.lora_manager = SimpleNamespace(has_encoder=False)
        self.req_states = SimpleNamespace(num_computed_prefill_tokens=None)


def test_second_model_runner_tells_two_versions_of_an_adapter_apart():
    runner = SecondRunner()
    state = BatchLoraState(3)
    state.serve(runner)
    numbers = [7, 2**53 - 1, 7]  # a reload gives an adapter a new one
    for index, number in enumerate(numbers):
        state.add_request(f"r{index}", index, LoRARequest("acme", number, "/adapters/acme"))
    names = [f"r{index}" for index in range(3)]
    _, (mapping,), active = state.make_lora_inputs(names, np.arange(3), np.array([4, 1, 1]))
    assert mapping.ids.tolist() == numbers
    assert sorted(request.lora_int_id for request in active) == [7, 2**53 - 1]


@pytest.mark.parametrize("rows", [None, [0, 2]])
def test_a_step_with_other_rows_of_the_base_model_is_another_step(rows):
    def step(base_rows):
        return BatchMapping(
            np.array([3, 0]), np.array([4, 4]), None, LoRAMappingType.LANGUAGE, base_rows
        )

    base_rows = None if rows is None else np.array(rows)
    assert step(base_rows) == step(base_rows)
    assert step(np.array([2, 0])) != step(base_rows)


@pytest.mark.parametrize("start", [0, 7, 70_000])
def test_a_requests_adapter_reaches_workers_with_its_start(start):
    sent = pickle.loads(pickle.dumps(lora(3, start)))
    assert isinstance(sent, ActivatedLoRARequest)
    assert sent.start == start
    assert sent == lora(3)
    assert {sent, lora(3, start + 1)} == {sent}
    assert type(from_token(sent, None)) is LoRARequest
    assert from_token(sent, 2).start == 2
