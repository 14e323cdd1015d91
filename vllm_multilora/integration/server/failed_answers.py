"""The reason of a failed request, where vLLM loses it on its way to the client.

An API server gets it as an exception, in the place of the request's output. Most endpoints make a
status of that, or an event of their stream. Responses that are streamed or computed in the
background have no place for it: their streams break off or never end, and whoever asks for one is
told that it is still to come. Streams of Anthropic's messages and of Cohere's chats are made of
chat completions, and the event with the error is taken for one of these.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from openai.types.responses import ResponseFailedEvent
from vllm.entrypoints.anthropic.protocol import AnthropicError, AnthropicErrorResponse
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_multilora.integration.server.activation import is_active_behind

_FAILURES = (GracefulHTTPError, EngineDeadError)
"""What ends a request without an output; the latter where the server is stopped, too."""

_CHAT_ERROR = 'data: {"error":'
"""How an error begins in a stream of chat completions, whose first field is their id."""


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


async def run_in_background(
    original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any
) -> None:
    try:
        await original(serving, request, *args, **kwargs)
    except _FAILURES as failure:
        if not is_active_behind(serving.engine_client):
            raise
        await _note_failed(serving, request.request_id, failure)


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


class _Completions:
    """A stream of chat completions up to the error that may end it.

    Args:
        events: As vLLM writes them. From version 0.33 on these are objects, and errors are left to
            vLLM.
    """

    def __init__(self, events: Any) -> None:
        self._events = events
        self.error: dict[str, Any] | None = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for event in self._events:
            if isinstance(event, str) and event.startswith(_CHAT_ERROR):
                self.error = json.loads(event.removeprefix("data: "))["error"]
                return
            yield event


async def stream_message(
    original: Callable[..., Any], serving: Any, generator: Any
) -> AsyncIterator[str]:
    completions = _Completions(generator)
    async with aclosing(
        original(serving, completions if is_active_behind(serving.engine_client) else generator)
    ) as events:
        async for event in events:
            yield event
    if (error := completions.error) is not None:
        told = AnthropicError(type=error["type"], message=error["message"])
        yield f"event: error\ndata: {AnthropicErrorResponse(error=told).model_dump_json()}\n\n"


def stream_chat(
    original: Callable[..., Any],
    serving: Any,
    request: Any,
    outputs: Any,
    request_id: str,
    model: str,
    *args: Any,
    **kwargs: Any,
) -> AsyncIterator[Any]:
    """A stream of chat completions; of those of a derived class vLLM makes Cohere's."""
    events = original(serving, request, outputs, request_id, model, *args, **kwargs)
    if hasattr(serving, "create_chat_v2") and is_active_behind(serving.engine_client):
        return _for_cohere(events, request_id, model)
    return events


async def _for_cohere(events: Any, request_id: str, model: str) -> AsyncIterator[Any]:
    """Ends a stream in such a way that vLLM tells the reason in Cohere's last event.

    That takes an exception, and a completion before it.
    """
    completions = _Completions(events)
    has_begun = False
    async with aclosing(events):
        async for event in completions:
            has_begun = True
            yield event
    if (error := completions.error) is None:
        return
    if not has_begun:
        choice = {"index": 0, "delta": {"role": "assistant"}}
        first = {"id": request_id, "model": model, "choices": [choice]}
        yield f"data: {json.dumps(first)}\n\n"
    raise RuntimeError(error["message"])
