"""The backends that are not a CPU's default answer through vLLM as PEFT does.

Without a GPU the Triton kernels run in Triton's interpreter, which is slow: requests are few and
short here, and two slots for five adapters make them change hands all the time.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from .cases import Case, Scenario
from .engine import answer, running_engine
from .recipes import EMBEDDING_RECIPE

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

NEW_TOKENS = 2
ADAPTERS = ("patterns", "qv-r5", EMBEDDING_RECIPE.name, "rslora-r16", "layer1-only-r8")
"""Ranks that differ by module, an odd rank, embedding and head, a scaling, untouched layers."""
SETTINGS = {
    "torch": {"backend": "torch"},
    "triton": {"backend": "triton"},
    "triton-invariant": {"backend": "triton", "batch_invariant": True},
}


def backends_of_layers(worker: Any) -> set[str]:
    """Runs in the worker: the backends of all layers with LoRA."""
    manager = worker.model_runner.lora_manager._adapter_manager
    return {module.punica_wrapper.backend for module in manager.modules.values()}


@pytest.fixture(scope="module", params=SETTINGS)
def engine(request, llama: Scenario) -> "Iterator[tuple[str, LLM]]":
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        with running_engine(
            llama.base,
            max_loras=2,
            enable_prefix_caching=False,
            additional_config={"multilora": SETTINGS[request.param]},
        ) as llm:
            yield request.param, llm


def assert_as_peft(llm: "LLM", llama: Scenario, cases: list[Case]) -> None:
    outputs = answer(llm, llama, cases, new_tokens=NEW_TOKENS)
    found = [tuple(output.outputs[0].token_ids) for output in outputs]
    assert found == [case.expected.tokens[:NEW_TOKENS] for case in cases]


def test_every_layer_runs_on_the_backend_that_was_asked_for(engine):
    backend, llm = engine
    assert llm.collective_rpc(backends_of_layers) == [{backend}]


def test_mixed_batches_of_more_adapters_than_slots(engine, llama: Scenario):
    """All are sent at once; a step has two adapters at most, and base requests beside them."""
    cases = [c for name in (*ADAPTERS, None) for c in llama.cases_of(name) if len(c.prompt) == 7]
    assert_as_peft(engine[1], llama, cases)


def test_an_adapter_is_itself_again_after_losing_its_slot(engine, llama: Scenario):
    """Its place was taken by the last ones of the test above."""
    cases = [next(c for c in llama.cases_of(name) if len(c.prompt) == 1) for name in ADAPTERS[:2]]
    assert_as_peft(engine[1], llama, cases)
