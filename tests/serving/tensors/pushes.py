"""Adapters that are given to an engine's workers as tensors, and what is left of them."""

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from vllm_multilora.integration.memory_folders import users_folder

from ..engine import lora_request
from ..models.cases import Scenario
from ..slots.test_offline_calls import case_of, tokens

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

NUMBER = 123
EXTENSION = "tests.serving.tensors.tensor_loader.Extension"


def pushed(number: int = NUMBER) -> "LoRARequest":
    """What a framework's requests name."""
    from vllm.lora.request import LoRARequest

    from .tensor_loader import PATH

    return LoRARequest(str(number), number, PATH)


def push(llm: "LLM", folder: Path, factor: float = 1.0) -> None:
    assert {*llm.collective_rpc("push", args=(NUMBER, folder, factor))} == {True}


def folders_in_memory() -> list[str]:
    """What this process and those that it has started hold of adapters given as tensors."""
    process = psutil.Process()
    ours = {each.pid for each in (process, *process.children(recursive=True))}
    folders = users_folder().glob(f"*/{NUMBER}-*")
    return [str(each) for each in folders if int(each.parent.name.partition("-")[0]) in ours]


def assert_answers(llm: "LLM", llama: Scenario, name: str) -> None:
    """The tensors that were loaded last are an adapter's; beside them, one from a folder."""
    assert NUMBER in llm.llm_engine.list_loras()
    case, other = case_of(llama, name), [*llama.adapters][2]
    assert tokens(llm, case, pushed()) == case.expected.tokens
    case = case_of(llama, other)
    assert tokens(llm, case, lora_request(llama, other)) == case.expected.tokens
