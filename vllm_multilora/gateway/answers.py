"""Names the adapter and its version in answers.

- The headers `x-multilora-adapter` and `x-multilora-version`. A stream's headers are sent before
  anything is computed. They name the version that the adapter's name stood for at that time, which
  the request is bound to.
- The field `multilora` of the answer, or of a stream's first event once it is known. It names the
  version that computed the answer. The two differ if an adapter's files have changed without a
  registration, and its old version was no longer in memory.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders

from vllm_multilora.gateway.endpoints import header, route_path
from vllm_multilora.gateway.refused_answers import RETRY_LATER, error_answer
from vllm_multilora.integration.server.requests.engine_calls import IS_STOPPING
from vllm_multilora.integration.server.requests.http_calls import (
    SHOWN_DIGITS,
    HttpCall,
    current_call,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADAPTER_HEADER = "x-multilora-adapter"
"""Names the adapter that made the answer, or that a route has led the request to."""

VERSION_HEADER = "x-multilora-version"
"""The adapter's version: the first digits of its digest."""

_EVENT = b"data: {"

_AFTER_SHUTDOWN = "cannot schedule new futures after shutdown"
"""What a call fails with in a server that is being stopped: vLLM's threads have ended."""


class HttpCallMiddleware:
    """Fills `current_call`, and names adapter and version in the answer, streamed ones included.

    Args:
        app: What answers the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        call = HttpCall(Headers(scope=scope), path=route_path(scope).rstrip("/"))
        token = current_call.set(call)
        answer = None
        if scope["type"] == "http":
            answer = _Answer(call, send)
            send = answer.send
        try:
            await self._app(scope, receive, send)
        except RuntimeError as error:
            if answer is None or answer.has_begun or str(error) != _AFTER_SHUTDOWN:
                raise
            refused = error_answer(HTTPStatus.SERVICE_UNAVAILABLE, IS_STOPPING, path=call.path)
            await refused(scope, receive, send)
        finally:
            current_call.reset(token)


class _Answer:
    """An answer on its way to the client."""

    def __init__(self, call: HttpCall, send: Send) -> None:
        self._call = call
        self._send = send
        self._start: Message | None = None  # held until the body is there
        self._is_complete = False  # nothing is to be added any more
        self.has_begun = False

    def send(self, message: Message) -> Awaitable[None]:
        """Takes a message; most are passed on without a coroutine of its own."""
        return self._send(message) if self._is_complete else self._add(message)

    async def _add(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._begin(message):
                return
        elif message["type"] == "http.response.body":
            message = self._named(message)
            if self._start is not None:
                start, self._start = self._start, None
                await self._send(start)
        await self._send(message)

    def _begin(self, start: Message) -> bool:
        """Adds the headers; whether they are to be held until the body is there."""
        call, added = self._call, []
        self.has_begun = True
        if call.adapter is not None:
            added.append((ADAPTER_HEADER.encode(), _as_header(call.adapter)))
        if call.digest is not None:
            added.append((VERSION_HEADER.encode(), call.digest[:SHOWN_DIGITS].encode()))
        if start["status"] == 503 and header(start["headers"], b"retry-after") is None:
            added.append((b"retry-after", RETRY_LATER.encode()))
        start["headers"] = [*start["headers"], *added]
        kind = header(start["headers"], b"content-type") or b""
        is_json = kind.startswith(b"application/json")
        is_answer = call.lora is not None and start["status"] == 200
        self._is_complete = not is_answer or not (is_json or kind.startswith(b"text/event-stream"))
        if is_answer and is_json:
            self._start = start
        return self._start is not None

    def _named(self, message: Message) -> Message:
        """The first part of a body that can name what has computed it, with that in it."""
        body, ran, start = message.get("body", b""), self._call.ran, self._start
        event = 0 if start is not None else body.find(_EVENT)
        at = event if start is not None else event + len(_EVENT) - 1
        if start is not None:
            self._is_complete = True  # it is whole, or begins here
        if ran is None or event < 0 or body[at : at + 1] != b"{":
            return message
        self._is_complete = True
        field = _field(self._call, ran)
        rest = body[at + 1 :]
        named = b"".join((body[: at + 1], field, b"" if rest[:1] == b"}" else b",", rest))
        if start is not None:
            headers = MutableHeaders(scope=start)
            headers[VERSION_HEADER] = ran[:SHOWN_DIGITS]
            if (length := headers.get("content-length")) is not None:
                headers["content-length"] = str(int(length) + len(named) - len(body))
        return {**message, "body": named}


@lru_cache(4_096)
def _as_header(name: str) -> bytes:
    """An adapter's name in a header, which holds ASCII and neither begins nor ends with spaces.

    Other names are percent-encoded, as in a URL.
    """
    inner_space = " " if name == name.strip() else ""
    return quote(name, safe="/:@+*" + inner_space).encode()


def _field(call: HttpCall, ran: str) -> bytes:
    assert call.lora is not None
    value = {"adapter": call.lora.lora_name, "version": ran[:SHOWN_DIGITS]}
    return b'"multilora":' + json.dumps(value, separators=(",", ":")).encode()
