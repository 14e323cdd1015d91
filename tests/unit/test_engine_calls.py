"""What is asked of an engine beside requests ends when nobody hears its answers any more."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_multilora.integration.patching.ledger import PATCHES
from vllm_multilora.integration.server import engine_calls

LIMIT_S = 5.0


@pytest.fixture(autouse=True)
def active(monkeypatch: pytest.MonkeyPatch) -> None:
    (patch,) = (one for one in PATCHES if one.handler.startswith("server.engine_calls:"))
    assert patch.apply()
    monkeypatch.setattr(engine_calls, "is_active", lambda vllm_config: True)


def client_of(hearing: "asyncio.Task[None]") -> Any:
    """vLLM's client of an engine that never answers by itself."""

    async def send(message: object, engine: object) -> None:
        pass

    client: Any = AsyncMPClient.__new__(AsyncMPClient)
    client.vllm_config, client.client_index = object(), 0
    client.encoder = SimpleNamespace(encode=lambda call: [call])
    client.utility_results = {}
    client.resources = SimpleNamespace(output_queue_task=hearing)
    client._send_input_message = send
    return client


def during_a_call(
    then: Callable[[Any, "asyncio.Task[None]"], None],
) -> Any:
    """What a call is answered during which something happens to the client."""

    async def until_asked(client: Any) -> None:
        while not client.utility_results:
            await asyncio.sleep(0)

    async def run() -> Any:
        hearing = asyncio.create_task(_for_ever())
        client = client_of(hearing)
        call: Awaitable[Any] = asyncio.create_task(
            client._call_utility_async("add_lora", "acme", engine=b"0")
        )
        async with asyncio.timeout(LIMIT_S):
            await until_asked(client)
            then(client, hearing)
            try:
                return await call
            finally:
                hearing.cancel()

    return asyncio.run(run())


async def _for_ever() -> None:
    await asyncio.Event().wait()


def test_a_call_of_an_engine_that_dies_or_is_stopped_ends() -> None:
    with pytest.raises(EngineDeadError):
        during_a_call(lambda client, hearing: hearing.cancel())


def test_a_call_has_the_engines_answer() -> None:
    def answer(client: Any, hearing: object) -> None:
        (future,) = client.utility_results.values()
        future.set_result("digest")

    assert during_a_call(answer) == "digest"


def test_a_call_has_the_engines_error() -> None:
    def fail(client: Any, hearing: object) -> None:
        (future,) = client.utility_results.values()
        future.set_exception(ValueError("no such adapter"))

    with pytest.raises(ValueError, match="no such adapter"):
        during_a_call(fail)
