"""What is asked of an engine beside requests ends when nobody hears its answers any more."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.utils.counter import AtomicCounter
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_multilora.integration.server.names import registration
from vllm_multilora.integration.server.requests import engine_calls

from .test_server_bounds import LOAD

LIMIT_S = 5.0
UNAVAILABLE = HTTPStatus.SERVICE_UNAVAILABLE


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
            engine_calls.answer_of(
                client, client._call_utility_async("add_lora", "acme", engine=b"0")
            )
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


def test_a_call_has_the_engines_error() -> None:
    def fail(client: Any, hearing: object) -> None:
        (future,) = client.utility_results.values()
        future.set_exception(ValueError("no such adapter"))

    with pytest.raises(ValueError, match="no such adapter"):
        during_a_call(fail)


def test_a_call_of_an_engine_that_is_being_stopped_is_another_servers() -> None:
    def refuse(client: Any, hearing: object) -> None:
        (future,) = client.utility_results.values()
        future.set_exception(Exception("Server shutting down"))

    with pytest.raises(GracefulHTTPError, match="being stopped") as refused:
        during_a_call(refuse)
    assert refused.value.http_status == 503


@pytest.mark.parametrize(
    ("error", "status"), [(EngineDeadError(), 500), (GracefulHTTPError("stops", UNAVAILABLE), 503)]
)
def test_what_nobody_waits_for_fails_quietly_where_an_engine_has_died(
    error: Exception, status: int
) -> None:
    """A registration that is refused has the adapter removed from engines that have taken it."""
    asked: list[int] = []
    unheard: list[str] = []

    async def refuse(*call: object, engine: str) -> None:
        raise error

    async def remove(number: int) -> None:
        asked.append(number)
        raise error

    async def run() -> int:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: unheard.append(context["message"]))
        refusal: Any = await registration.load_adapter(models, LOAD)
        async with asyncio.timeout(LIMIT_S):
            while not asked or registration._tasks:
                await asyncio.sleep(0)
        gc.collect()
        return int(refusal.error.code)

    core = SimpleNamespace(
        remove_lora_async=remove, core_engines=("the only one",), _call_utility_async=refuse
    )
    client = SimpleNamespace(engine_core=core, vllm_config=None)
    models: Any = SimpleNamespace(
        engine_client=client,
        lora_requests={},
        is_base_model="base".__eq__,
        lora_id_counter=AtomicCounter(),
    )
    assert asyncio.run(run()) == status
    assert asked == [1]
    assert not unheard
