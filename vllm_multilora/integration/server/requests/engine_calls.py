"""What an API server asks of its engines beside requests: registrations, unloads, reports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from http import HTTPStatus
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_multilora.integration.api_server.registered_versions import Version, note
from vllm_multilora.integration.blends import blend_of
from vllm_multilora.integration.engine.adapter_status import METHOD, REGISTER, Report
from vllm_multilora.integration.failed_requests import AdapterRefusedError
from vllm_multilora.integration.server.requests.own_templates import OWN_TEMPLATES

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

IS_STOPPING = "the server is being stopped; ask another one, or this one when it has been started"
"""What clients are told by a server that answers the requests that it has, and then ends."""

STOP = SimpleNamespace(has_come=False, act=lambda: None)
"""What a signal to stop this server sets, and calls, before vLLM hears it."""

_STOPPING = "Server shutting down"
"""What vLLM's engine core answers all calls with once it has been told to stop."""


def stopped() -> GracefulHTTPError:
    """The error of requests that a server ends with itself."""
    return GracefulHTTPError(IS_STOPPING, HTTPStatus.SERVICE_UNAVAILABLE)


async def answer_of(core: Any, asked: Awaitable[Any]) -> Any:
    """Waits for an engine's answer, for as long as anything hears it.

    A load may take as long as storage does. Whoever waits for it would keep a server from ending
    whose engine has died, or has been stopped.

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
        raise stopped() from error
    finally:
        call.cancel()


async def engine_reports(core: Any, asked: list[int]) -> list[Report]:
    """Asks each engine for its report; vLLM's own `collective_rpc` returns that of the first."""
    return [report for answer in await _ask_all(core, METHOD, asked) for report in answer]


async def register(client: Any, lora: LoRARequest) -> None:
    """Has every engine behind a client read and check an adapter, and notes which version it is.

    With `load_inplace`, running requests go on with it.

    Raises:
        AdapterRefusedError: An engine cannot serve it, or its chat template cannot be used.
    """
    answers = await _ask_all(client.engine_core, REGISTER, msgspec.structs.asdict(lora))
    for answer in answers:
        if "problems" in answer:
            raise AdapterRefusedError.of_dict(lora.lora_int_id, answer)
    read = answers[0]
    if read and blend_of(lora) is None:
        known = read["kind"], tuple(read["invocation"])
        note(client, lora.lora_int_id, Version(read["digest"], time.time(), *known))
    if (templates := OWN_TEMPLATES.get(client)) is not None:
        await templates.of(lora)


async def _ask_all(core: Any, method: str, argument: Any) -> list[Any]:
    calls = (
        core._call_utility_async("collective_rpc", method, None, (argument,), None, engine=engine)
        for engine in core.core_engines
    )
    answers: list[Any] = await answer_of(core, asyncio.gather(*calls))
    return answers
