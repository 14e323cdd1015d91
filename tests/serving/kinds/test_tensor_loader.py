"""Frameworks for training, which have vLLM's workers load adapters from tensors."""

from typing import TYPE_CHECKING

import pytest

from ..engine import lora_request, running_engine
from ..models.cases import Scenario
from ..slots.test_offline_calls import case_of, tokens

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

NUMBER = 123


@pytest.fixture
def _vllms_own_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there again after a test that has taken it over in this process."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager as Manager

    monkeypatch.setattr(Manager, "_load_adapter", Manager._load_adapter)


def assert_answers(llm: "LLM", llama: Scenario, name: str) -> None:
    """The tensors that were loaded last are an adapter's; beside them, one from a folder."""
    from vllm.lora.request import LoRARequest

    from .tensor_loader import PATH

    assert NUMBER in llm.llm_engine.list_loras()
    llm.reset_prefix_cache()  # to vLLM, it is the adapter that was there before
    case, other = case_of(llama, name), [*llama.adapters][2]
    of_tensors = LoRARequest(str(NUMBER), NUMBER, PATH)
    assert tokens(llm, case, of_tensors) == case.expected.tokens
    case = case_of(llama, other)
    assert tokens(llm, case, lora_request(llama, other)) == case.expected.tokens


def test_what_workers_are_given_answers_as_peft(llama: Scenario) -> None:
    with running_engine(
        llama.base, worker_extension_cls="tests.serving.kinds.tensor_loader.Extension"
    ) as llm:
        for name in [*llama.adapters][:2]:
            assert llm.collective_rpc("push", args=(NUMBER, llama.adapters[name])) == [True]
            assert_answers(llm, llama, name)


@pytest.mark.usefixtures("_vllms_own_loader")
def test_what_an_engine_is_given_answers_as_peft(llama: Scenario) -> None:
    from .tensor_loader import of_tensors, take_over

    take_over()
    with running_engine(llama.base, in_process=True) as llm:
        for name in [*llama.adapters][:2]:
            llm.llm_engine.remove_lora(NUMBER)
            assert llm.llm_engine.add_lora(of_tensors(NUMBER, llama.adapters[name]))
            assert_answers(llm, llama, name)


@pytest.mark.usefixtures("_vllms_own_loader")
def test_checks_that_nothing_would_make_are_refused(llama: Scenario) -> None:
    from .tensor_loader import take_over

    take_over()
    settings = {"multilora": {"allowed_roots": ["/"]}}
    with (
        pytest.raises(Exception, match="--multilora-allowed-roots would check no adapter here"),
        running_engine(llama.base, in_process=True, additional_config=settings),
    ):
        pass
