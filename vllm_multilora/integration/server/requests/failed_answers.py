"""The reason of a failed request in streams of /v1/responses, which have no place for it.

An API server gets the reason as an exception, in the place of the request's output. Most endpoints
make a status or an event of it. A stream of responses breaks off instead, and one that is computed
in the background never ends: its client waits, and so does a server that is being stopped.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from openai.types.responses import ResponseFailedEvent
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_multilora.integration.server.settings.gateway_activation import is_active_behind

_FAILURES = (GracefulHTTPError, EngineDeadError)
"""What ends a request without an output; the latter where the server is stopped, too."""


class _FailedEvent(ResponseFailedEvent):
    response: ResponsesResponse  # type: ignore[assignment]


async def stream_response(
    original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    begun, number = None, 0
    try:
        async with aclosing(original(serving, request, *args, **kwargs)) as events:
            async for event in events:
                if begun is None:
                    begun = event.response  # the first event announces it
                number += 1
                yield event
    except _FAILURES as failure:
        if begun is None or not is_active_behind(serving.engine_client):
            raise
        error = await _note_failed(serving, request.request_id, failure)
        failed = begun.model_copy(update={"status": "failed", "error": error})
        yield _FailedEvent(type="response.failed", sequence_number=number, response=failed)


async def stream_from_background(
    original: Callable[..., Any], *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    async with aclosing(original(*args, **kwargs)) as events:
        async for event in events:
            yield event
            if isinstance(event, _FailedEvent):
                return


async def _note_failed(serving: Any, response_id: str, failure: Exception) -> dict[str, Any]:
    """Has a response that is kept say why it has failed, if it is still to be made.

    Returns:
        The failure in the shape of OpenAI's `ResponseError`, which has codes of its own.
    """
    info = serving.create_error_response(failure).error
    is_servers = info.code >= HTTPStatus.INTERNAL_SERVER_ERROR
    error = {
        "code": "server_error" if is_servers else "invalid_prompt",
        "message": info.message,
        "type": info.type,
    }
    async with serving.response_store_lock:
        kept = serving.response_store.get(response_id)
        if kept is not None and kept.status in ("queued", "in_progress"):
            kept.status, kept.error = "failed", error
    return error
