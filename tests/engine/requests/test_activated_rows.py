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
from vllm_multilora.integration.step.mapping import BatchMapping, base_rows_of, make_lora_inputs
from vllm_multilora.integration.worker.manager import set_active_loras_from_inputs


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
    taken = []
    runner = SimpleNamespace(req_states=SimpleNamespace(num_computed_prefill_tokens=None))
    for batch in steps_of(requests):
        state = SimpleNamespace(
            lora_ids=ids_of(requests, [(i, 0, 0) for i in range(len(requests))]),
            lora_requests={str(i): r[0] for i, r in enumerate(requests) if r[0]},
        )
        rows = np.array([index for index, *_ in batch])
        computed = np.zeros(len(requests), np.int32)
        computed[rows] = [min(begin, requests[i][1]) for i, begin, _ in batch]
        runner.req_states.num_computed_prefill_tokens = computed
        runner.lora_manager = None
        tokens = np.array([count for *_, count in batch], np.int32)
        inputs = make_lora_inputs(None, state, [str(i) for i in rows], rows, tokens)
        set_active_loras_from_inputs(lambda *args: taken.append(args), runner, *inputs)
        assert list(taken[-1][2]) == expected(requests, batch)


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
