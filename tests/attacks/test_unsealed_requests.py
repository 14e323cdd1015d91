"""On a server with tenants, what reaches the engine past the gateway gets no token."""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vllm_multilora.gateway.app  # noqa: F401 (as vLLM imports it where it mounts the gateway)
from tests.serving.engine import lora_request, running_async_engine
from tests.serving.models.cases import Case, Scenario
from vllm_multilora.integration.seals import SECRET_VARIABLE, Seal, sealed
from vllm_multilora.tenants.keys import stored

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = [pytest.mark.serving, pytest.mark.slow]


@pytest.fixture
def engine(
    llama: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "Iterator[AsyncLLM]":
    """As a gRPC server has one, say."""
    tenants = tmp_path / "tenants.json"
    tenants.write_text(json.dumps({"tenants": {"acme": {"keys": [stored("sk-acme")]}}}))
    for variable in (SECRET_VARIABLE, "MULTILORA_API_SERVERS"):
        monkeypatch.setenv(variable, "")
    settings = {"multilora": {"tenants": str(tenants)}}
    with running_async_engine(llama.base, max_loras=2, additional_config=settings) as running:
        yield running


async def tokens(
    engine: "AsyncLLM", llama: Scenario, case: Case, name: str, salt: str | None
) -> list[int]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompt = TokensPrompt(prompt_token_ids=list(case.prompt))
    if salt is not None:
        prompt["cache_salt"] = salt
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    lora = case.adapter and lora_request(llama, case.adapter)
    found: list[int] = []
    async for output in engine.generate(prompt, sampling, name, lora_request=lora):
        found = list(output.outputs[0].token_ids)
    return found


def test_request_past_the_gateway_fails_without_a_token(
    engine: "AsyncLLM", llama: Scenario
) -> None:
    from vllm.exceptions import GracefulHTTPError

    secret = os.environ[SECRET_VARIABLE]
    foreign = (None, "a salt", sealed("another secret", Seal("acme")))

    async def ask_all() -> None:
        for number, case in enumerate((llama.cases[0], llama.cases_of(None)[0])):
            for salt in foreign:
                with pytest.raises(GracefulHTTPError, match="to known routes only"):
                    await tokens(engine, llama, case, f"unsealed {number} {salt}", salt)
            own = sealed(secret, Seal("acme", salt="salt"))
            answer = await tokens(engine, llama, case, f"sealed {number}", own)
            assert tuple(answer) == case.expected.tokens[:3]

    assert len(secret) == 64
    asyncio.run(ask_all())
