"""What an API server asks of its engines beside requests: registrations, unloads, reports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_multilora.integration.engine.adapter_status import METHOD, Report
from vllm_multilora.integration.server.settings.gateway_activation import is_active

_STOPPING = "Server shutting down"
"""What vLLM's engine core answers all calls with once it has been told to stop."""


async def call_utility(
    original: Callable[..., Any], client: Any, method: str, *args: Any, engine: Any
) -> Any:
    """Calls an engine core, for as long as there is somebody who hears its answer.

    A load may take as long as storage does. Whoever waits for it would keep a server from ending
    whose engine has died, or has been stopped.

    Raises:
        EngineDeadError: The engine's answers are not heard any more.
        GracefulHTTPError: It answers the requests that it has, and then ends.
    """
    if not is_active(client.vllm_config):
        return await original(client, method, *args, engine=engine)
    client._ensure_output_queue_task()
    hearing = client.resources.output_queue_task
    call = asyncio.ensure_future(original(client, method, *args, engine=engine))
    try:
        await asyncio.wait((call, hearing), return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            raise EngineDeadError
        return call.result()
    except Exception as error:
        if str(error) != _STOPPING:
            raise
        raise GracefulHTTPError(
            "the server is being stopped; ask another one, or this one when it has been started",
            HTTPStatus.SERVICE_UNAVAILABLE,
        ) from error
    finally:
        call.cancel()


async def engine_reports(client: Any, asked: list[int]) -> list[Report]:
    """Asks each engine for its report; vLLM's own `collective_rpc` returns that of the first."""
    answers = await asyncio.gather(
        *(
            client._call_utility_async(
                "collective_rpc", METHOD, None, (asked,), None, engine=engine
            )
            for engine in client.core_engines
        )
    )
    return [report for answer in answers for report in answer]
