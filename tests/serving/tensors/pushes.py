"""Adapters that are given to an engine's workers as tensors, and what is left of them."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from vllm_multilora.integration.memory_folders import users_folder

from ..engine import lora_request
from ..models.cases import Scenario
from ..slots.test_offline_calls import case_of, tokens

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
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


def memory() -> int:
    """Bytes of this process's descendants and of the folders of tensors, pages of both once."""
    private = 0
    for process in psutil.Process().children(recursive=True):
        try:
            private += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            continue
    return private + sum(
        os.stat(os.path.join(folder, name)).st_size  # noqa: PTH116, PTH118
        for folder in folders_in_memory()
        for name in os.listdir(folder)  # noqa: PTH208
    )


def versions_of(output: "RequestOutput", names: Sequence[str]) -> list[str]:
    """The version that has computed each token but the last, as the output's spans name it."""
    completion: Any = output.outputs[0]
    assert output.prompt_token_ids is not None
    prompt, found, versions = len(output.prompt_token_ids), completion.token_ids, []
    for spans, begin, end in (
        (completion.prompt_policy_token_spans, 1, prompt),
        (completion.policy_token_spans, 0, len(found)),
    ):
        assert spans[0]["start_token"] == begin
        assert spans[-1]["end_token"] == end
        for one, other in itertools.pairwise(spans):
            assert one["end_token"] == other["start_token"]
            assert one["update_seq"] < other["update_seq"]
        for span in spans:
            name = names[span["update_seq"] % len(names)]
            versions += [name] * (span["end_token"] - span["start_token"])
    return versions
