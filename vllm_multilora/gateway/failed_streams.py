"""Failures of adapters' streams, with their status where the stream has not begun.

vLLM sends status 200 before it computes anything. So the start of a stream is held here until its
first event with a result: a request that fails before that gets the status and the reason of its
failure. A stream of `/v1/responses` that fails later ends with `response.failed`; vLLM breaks off.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from vllm_multilora.gateway.endpoints import header
from vllm_multilora.gateway.refused_answers import error_answer
from vllm_multilora.integration.server.requests.http_calls import HttpCall, current_call

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_RESPONSES = "/v1/responses"
_WITHOUT_RESULT = (b"event: response.created", b"event: response.in_progress")
_ANTHROPIC = {
    "invalid_request_error": HTTPStatus.BAD_REQUEST,
    "not_found_error": HTTPStatus.NOT_FOUND,
    "overloaded_error": HTTPStatus.SERVICE_UNAVAILABLE,
}
"""Statuses of Anthropic's errors, which do not hold them."""


class FailedStreamsMiddleware:
    """Holds the start of each stream of an adapter's until its first result.

    Args:
        app: Answers the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = current_call.get()
        assert call is not None  # set by what is in front of this
        stream = _Stream(call, scope, receive, send)
        try:
            await self._app(scope, receive, stream.send)
        except Exception as error:
            failure = _with_status(error)
            if failure is None or not await stream.fail(failure.http_status, failure.message):
                raise


class _Stream:
    """An answer on its way; one that is no stream of an adapter's passes as it is."""

    def __init__(self, call: HttpCall, scope: Scope, receive: Receive, send: Send) -> None:
        self._call = call
        self._answer_to = scope, receive, send
        self._send = send
        self._held: list[Message] = []  # the start, and events without a result
        self._is_ours = self._has_failed = False
        self._created: bytes | None = None  # the first event of a response
        self._events = 0

    def send(self, message: Message) -> Awaitable[None]:
        """Takes a message of the answer; most are passed on without a coroutine of its own."""
        is_looked_at = self._held or self._has_failed or self._call.path == _RESPONSES
        is_plain = message["type"] == "http.response.body" and not is_looked_at
        return self._send(message) if is_plain else self._look(message)

    async def _look(self, message: Message) -> None:
        if self._has_failed:
            return
        if message["type"] == "http.response.start":
            self._is_ours = self._call.lora is not None and _is_stream(message)
            if self._is_ours:
                self._held.append(message)
                return
        elif self._is_ours and (event := message.get("body", b"")):
            self._events += 1
            if self._call.path == _RESPONSES and self._created is None:
                self._created = event
            if self._held:
                if event.startswith(_WITHOUT_RESULT):
                    self._held.append(message)
                    return
                if (found := _error_in(event)) is not None:
                    self._has_failed = True
                    content, status = found
                    await JSONResponse(content, status)(*self._answer_to)
                    return
        for held in self._held:
            await self._send(held)
        self._held.clear()
        await self._send(message)

    async def fail(self, status: HTTPStatus, message: str) -> bool:
        """Ends a stream that has failed with an exception; returns whether it could."""
        if not self._is_ours:
            return False
        if self._held:
            await error_answer(status, message, path=self._call.path)(*self._answer_to)
        elif self._created is not None:
            event = _failed_event(self._created, self._events, status, message)
            await self._send({"type": "http.response.body", "body": event})
        else:
            return False
        return True


def _is_stream(start: Message) -> bool:
    kind = header(start["headers"], b"content-type") or b""
    return bool(start["status"] == HTTPStatus.OK) and kind.startswith(b"text/event-stream")


def _with_status(error: BaseException | None) -> Any:
    """The error of vLLM's with a status that an exception is, or was raised for; None for none."""
    while error is not None and not hasattr(error, "http_status"):
        error = error.__cause__ or error.__context__
    return error


def _error_in(event: bytes) -> tuple[Any, int] | None:
    """The error that an event tells, as an answer's body, and its status."""
    data = event[event.find(b"data: ") + len(b"data: ") :]
    if b'"error"' not in data[:32]:
        return None
    try:
        content = json.loads(data.split(b"\n", 1)[0])
    except ValueError:
        return None
    error = content.get("error") if isinstance(content, dict) else None
    if not isinstance(error, dict):
        return None
    if not isinstance(status := error.get("code"), int):
        status = _ANTHROPIC.get(str(error.get("type")), HTTPStatus.INTERNAL_SERVER_ERROR)
    return content, status


def _failed_event(created: bytes, number: int, status: HTTPStatus, message: str) -> bytes:
    """The last event of a response; its other fields are those of the event that announced it."""
    is_servers = status >= HTTPStatus.INTERNAL_SERVER_ERROR
    error = {
        "code": "server_error" if is_servers else "invalid_prompt",
        "message": message,
        "type": status.phrase,
    }
    response = json.loads(created.split(b"data: ", 1)[1])["response"]
    event = {
        "response": {**response, "status": "failed", "error": error},
        "sequence_number": number,
        "type": "response.failed",
    }
    return b"event: response.failed\ndata: " + json.dumps(event).encode() + b"\n\n"
