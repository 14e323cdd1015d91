"""Frameworks for training, which give vLLM's workers adapters as tensors."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..engine import generate, lora_request, running_engine
from ..models.cases import Scenario
from ..slots.test_offline_calls import case_of
from .pushes import EXTENSION, NUMBER, assert_answers, folders_in_memory, push, pushed

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def llm(llama: Scenario) -> "Iterator[LLM]":
    """Folders may come from one root only; tensors come from none."""
    root = str(next(iter(llama.adapters.values())).parent)
    with running_engine(
        llama.base,
        in_process=True,
        worker_extension_cls=EXTENSION,
        additional_config={"multilora": {"allowed_roots": [root]}},
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_left(llm: "LLM") -> None:
    llm.llm_engine.remove_lora(NUMBER)


def test_tensors_given_to_an_engine_answer_as_peft(llm: "LLM", llama: Scenario) -> None:
    from .tensor_loader import of_tensors

    for name in [*llama.adapters][:2]:
        llm.llm_engine.remove_lora(NUMBER)
        assert llm.llm_engine.add_lora(of_tensors(NUMBER, llama.adapters[name]))
        assert_answers(llm, llama, name)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_refused_tensors_leave_the_version_before(
    llm: "LLM", llama: Scenario, factor: float
) -> None:
    name = next(iter(llama.adapters))
    push(llm, llama.adapters[name])
    with pytest.raises(Exception, match=r"lora_A\.weight has \d+ of \d+ values NaN or infinite"):
        push(llm, llama.adapters[name], factor)
    assert_answers(llm, llama, name)
    assert len(folders_in_memory()) == 1
    assert llm.llm_engine.remove_lora(NUMBER)
    assert folders_in_memory() == []


def test_tensors_of_another_shape_are_refused_by_name(
    llm: "LLM", llama: Scenario, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "wrong"
    shutil.copytree(llama.adapters[next(iter(llama.adapters))], folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    wrong = next(name for name in tensors if "lora_A" in name)
    tensors[wrong] = tensors[wrong][:, :-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(Exception, match=wrong):
        push(llm, folder)
    assert NUMBER not in llm.llm_engine.list_loras()
    assert folders_in_memory() == []


def test_adapters_that_workers_forget_are_not_listed_nor_kept(llm: "LLM", llama: Scenario) -> None:
    first, second = (llama.adapters[name] for name in [*llama.adapters][:2])
    folders = {NUMBER: first, NUMBER + 1: second}
    assert llm.collective_rpc("push_all", args=(folders,)) == [True]
    assert llm.llm_engine.list_loras() >= {*folders}
    assert llm.collective_rpc("forget", args=(NUMBER,)) == [True]
    assert NUMBER not in llm.llm_engine.list_loras()
    assert NUMBER + 1 in llm.llm_engine.list_loras()
    assert folders_in_memory() == []
    assert llm.collective_rpc("forget", args=(NUMBER,)) == [False]
    assert llm.collective_rpc("forget", args=(NUMBER + 1,)) == [True]


def test_tensors_that_overflow_are_quarantined_until_others_are_given(
    llm: "LLM", llama: Scenario
) -> None:
    name = next(iter(llama.adapters))
    case = case_of(llama, name)
    push(llm, llama.adapters[name], 1e30)
    (output,) = generate(llm, [case.prompt], [pushed()])
    assert "quarantine" in str(output.outputs[0].stop_reason)
    push(llm, llama.adapters[name])
    assert_answers(llm, llama, name)


def test_the_last_of_two_versions_in_one_call_serves_alone(llm: "LLM", llama: Scenario) -> None:
    first, second = [*llama.adapters][:2]
    folders = (llama.adapters[first], llama.adapters[second])
    assert llm.collective_rpc("push_twice", args=(NUMBER, *folders)) == [True]
    assert_answers(llm, llama, second)
    assert len(folders_in_memory()) == 1


def test_tensors_without_a_configuration_say_what_is_missing(llm: "LLM", llama: Scenario) -> None:
    from .tensor_loader import of_tensors

    request = of_tensors(NUMBER, next(iter(llama.adapters.values())))
    request.peft_config = {}
    with pytest.raises(Exception, match="without a configuration: give the request PEFT's"):
        llm.llm_engine.add_lora(request)
    assert folders_in_memory() == []


def test_a_folder_is_no_workers_to_load(llm: "LLM", llama: Scenario) -> None:
    """Its engine core loads it, and would know nothing of it otherwise."""
    name = next(iter(llama.adapters))
    with pytest.raises(Exception, match="workers add no LoRA adapters"):
        llm.collective_rpc(lambda worker: worker.add_lora(lora_request(llama, name)))
