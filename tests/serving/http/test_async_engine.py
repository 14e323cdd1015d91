"""`AsyncLLM` as a library: calls for adapters, many at once, and answers as PEFT's beside them."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..engine import greedy, lora_request, running_async_engine
from ..models.cases import Case, Scenario

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = pytest.mark.serving

LENGTH = 7
"""Tokens of a prompt."""


@pytest.fixture
def engine(llama: Scenario) -> "Iterator[AsyncLLM]":
    slots = {"max_loras": 2, "max_cpu_loras": len(llama.adapters)}
    with running_async_engine(llama.base, **slots) as running:
        yield running


async def answer(engine: "AsyncLLM", llama: Scenario, case: Case) -> tuple[int, ...]:
    from vllm.sampling_params import RequestOutputKind

    (output,) = [
        output
        async for output in engine.generate(
            {"prompt_token_ids": list(case.prompt)},
            greedy(output_kind=RequestOutputKind.FINAL_ONLY),
            f"request of {case.adapter}",
            lora_request=case.adapter and lora_request(llama, case.adapter),
        )
    ]
    return tuple(output.outputs[0].token_ids)


def test_calls_and_answers_go_on_beside_each_other(
    engine: "AsyncLLM", llama: Scenario, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    async def use() -> None:
        missing = str(tmp_path / "missing")
        with pytest.raises(Exception, match=f"{missing}.* does not exist, expected") as raised:
            await engine.add_lora(LoRARequest("missing", 91, missing))
        assert "multilora" not in str(raised.value)
        first, *others = llama.adapters
        requests = [lora_request(llama, name) for name in llama.adapters]
        assert await asyncio.gather(*map(engine.add_lora, requests)) == [True] * len(requests)
        everybody = {request.lora_int_id for request in requests}
        assert await engine.list_loras() == everybody
        assert await engine.pin_lora(llama.adapter_id(first))
        with pytest.raises(Exception, match="was never added"):
            await engine.pin_lora(90)
        cases = [case for case in llama.cases if len(case.prompt) == LENGTH]
        found = await asyncio.gather(*(answer(engine, llama, case) for case in cases))
        assert {case.adapter: tokens for case, tokens in zip(cases, found, strict=True)} == {
            case.adapter: case.expected.tokens for case in cases
        }
        removed = [engine.remove_lora(llama.adapter_id(name)) for name in others]
        assert await asyncio.gather(*removed) == [True] * len(others)
        assert not await engine.remove_lora(llama.adapter_id(others[0]))
        assert await engine.list_loras() == {llama.adapter_id(first)}

    asyncio.run(use())
