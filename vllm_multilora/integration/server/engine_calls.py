"""What an API server asks of its engines beside requests: registrations, unloads, reports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from vllm_multilora.integration.patching.activation import is_active


async def call_utility(
    original: Callable[..., Any], client: Any, method: str, *args: Any, engine: Any
) -> Any:
    """Calls an engine core, for as long as there is somebody who hears its answer.

    A load may take as long as storage does. Whoever waits for it would keep a server from ending
    whose engine has died, or has been stopped.

    Raises:
        EngineDeadError: The engine's answers are not heard any more.
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
    finally:
        call.cancel()
