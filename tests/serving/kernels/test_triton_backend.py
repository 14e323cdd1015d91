"""The backends that are not a CPU's default answer through vLLM as PEFT does.

Without a GPU the Triton kernels run in Triton's interpreter, which is slow: requests are few and
short here, and two slots for five adapters make them change hands all the time.
"""

from collections.abc import Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.kernels.triton.triton_problems import watched
from vllm_multilora.metrics.definitions import EVICTIONS

from ..engine import greedy, loras_of, running_engine
from ..models.cases import Case, Scenario
from ..models.recipes import EMBEDDING_RECIPE

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

pytestmark = pytest.mark.serving

LENGTHS = (3, 5, 4)
"""New tokens of the requests, in turn: they end at different steps, beside others that go on."""
ADAPTERS = ("patterns", "qv-r5", EMBEDDING_RECIPE.name, "rslora-r16", "layer1-only-r8")
"""Ranks that differ by module, an odd rank, embedding and head, a scaling, untouched layers."""


def backends_of_layers(worker: Any) -> set[str]:
    """Runs in the worker: the backends of all layers with LoRA."""
    manager = worker.model_runner.lora_manager._adapter_manager
    return {module.punica_wrapper.backend for module in manager.modules.values()}


def watch_steps(worker: Any) -> None:
    """Runs in the worker: from now on, notes the adapters of every step, and its other rows."""
    worker.steps_seen = []
    manager = worker.model_runner.lora_manager._adapter_manager
    for wrapper in manager.punica_wrapper_mapping.values():
        update = wrapper.update_metadata

        def note(mapping, ids, *rest, wrapper=wrapper, update=update, **named) -> None:
            update(mapping, ids, *rest, **named)
            plan = wrapper.plan
            slots = plan.host[plan.layout.tile_slot][: plan.tiles].tolist()
            worker.steps_seen.append(({ids[slot] for slot in slots}, plan.tokens - plan.rows))

        wrapper.update_metadata = note


def steps_seen(worker: Any) -> list[tuple[set[int], int]]:
    """Runs in the worker: what it noted."""
    return worker.steps_seen


@pytest.fixture(
    scope="module",
    params=[
        "torch",
        pytest.param("triton", marks=pytest.mark.smoke("Triton kernels")),
    ],
)
def engine(request, llama: Scenario) -> "Iterator[tuple[str, LLM]]":
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        with (
            watched(),  # no interpreted kernel may reach beside its tensors
            running_engine(
                llama.base,
                in_process=True,
                max_loras=2,
                enable_prefix_caching=False,
                disable_log_stats=False,
                additional_config={"multilora": {"backend": request.param}},
            ) as llm,
        ):
            yield request.param, llm


def answer(llm: "LLM", llama: Scenario, cases: list[Case]) -> "list[RequestOutput]":
    """Sends all cases at once; outputs in the same order, of `LENGTHS` in turn."""
    return llm.generate(
        [{"prompt_token_ids": list(case.prompt)} for case in cases],
        [greedy(max_tokens=length) for _, length in zip(cases, cycle(LENGTHS), strict=False)],
        lora_request=loras_of(llama, cases),
        use_tqdm=False,
    )


def assert_as_peft(llm: "LLM", llama: Scenario, cases: list[Case]) -> None:
    found = [tuple(output.outputs[0].token_ids) for output in answer(llm, llama, cases)]
    expected = [case.expected.tokens for case in cases]
    assert found == [
        tokens[:length] for tokens, length in zip(expected, cycle(LENGTHS), strict=False)
    ]


def evictions(llm: "LLM") -> float:
    return sum(
        metric.value
        for metric in llm.get_metrics()
        if metric.name == EVICTIONS.name.removesuffix("_total") and metric.labels["tier"] == "gpu"
    )


def mixed(llama: Scenario) -> list[Case]:
    """A case of each adapter and, between them, two of the base model."""
    by_name = {name: llama.cases_of(name) for name in (None, *ADAPTERS)}
    own = [next(c for c in by_name[name] if len(c.prompt) == 7) for name in ADAPTERS]
    base = [c for c in by_name[None] if len(c.prompt) in (1, 7)]
    return [own[0], base[0], *own[1:3], base[1], *own[3:]]


def test_every_layer_runs_on_the_backend_that_was_asked_for(engine):
    backend, llm = engine
    assert llm.collective_rpc(backends_of_layers) == [{backend}]


def test_mixed_batches_of_more_adapters_than_slots(engine, llama: Scenario):
    """All are sent at once: base rows and two adapters share steps, and each slot is used again."""
    _, llm = engine
    cases = mixed(llama)
    # Base rows may have ended before an adapter is copied: two are in their slots when they begin.
    assert_as_peft(llm, llama, [case for case in cases if case.adapter in ADAPTERS[:2]])
    before = evictions(llm)
    llm.collective_rpc(watch_steps)
    assert_as_peft(llm, llama, cases)
    (seen,) = llm.collective_rpc(steps_seen)
    steps = [(set(adapters), base) for adapters, base in seen]
    assert any(len(adapters) == 2 and base for adapters, base in steps)
    assert max(len(adapters) for adapters, _ in steps) == 2
    assert evictions(llm) - before >= len(ADAPTERS) - 2 > 0


def test_an_adapter_is_itself_again_after_losing_its_slot(engine, llama: Scenario):
    """Its place was taken by the last ones of the test above."""
    _, llm = engine
    before = evictions(llm)
    cases = [next(c for c in llama.cases_of(name) if len(c.prompt) == 1) for name in ADAPTERS[:2]]
    assert_as_peft(llm, llama, cases)
    assert evictions(llm) > before
