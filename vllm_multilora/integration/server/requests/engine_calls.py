"""What an API server asks of its engines beside requests: registrations, unloads, reports."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_multilora.integration.engine.adapter_status import METHOD, Report

_STOPPING = "Server shutting down"
"""What vLLM's engine core answers all calls with once it has been told to stop."""


async def answer_of(core: Any, asked: Awaitable[Any]) -> Any:
    """Waits for an engine's answer, for as long as anything hears it.

    A load may take as long as storage does. Whoever waits for it would keep a server from ending
    whose engine has died, or has been stopped.

    Args:
        core: vLLM's client of the engine core; one without a process has nothing that could end.
        asked: The call.

    Raises:
        EngineDeadError: The engine's answers are not heard any more.
        GracefulHTTPError: It answers the requests that it has, and then ends.
    """
    hearing = getattr(getattr(core, "resources", None), "output_queue_task", None)
    call = asyncio.ensure_future(asked)
    try:
        waited_for = {call} if hearing is None else {call, hearing}
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
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


async def engine_reports(core: Any, asked: list[int]) -> list[Report]:
    """Asks each engine for its report; vLLM's own `collective_rpc` returns that of the first."""
    calls = (
        core._call_utility_async("collective_rpc", METHOD, None, (asked,), None, engine=engine)
        for engine in core.core_engines
    )
    answers = await answer_of(core, asyncio.gather(*calls))
    return [report for answer in answers for report in answer]
