"""Names the adapter and its version in answers, and tells of failures of streams.

- The headers `x-multilora-adapter` and `x-multilora-version`. A stream's headers are sent before
  anything is computed. They name the version that the adapter's name stood for at that time, which
  the request is bound to.
- The fields `policy_token_spans` and `prompt_policy_token_spans` of each choice, or of its last
  event, where an adapter is swapped in flight.
- The field `multilora` of the answer, or of a stream's first event once it is known. It names the
  version that computed the answer. The two differ if an adapter's files have changed without a
  registration, and its old version was no longer in memory.

Failures of adapters' streams have their status where the stream has not begun. vLLM sends status
200 before it computes anything. So the start of a stream is held here until its first event with a
result: a request that fails before that gets the status and the reason of its failure. A stream of
`/v1/responses` that fails later ends with `response.failed`; vLLM breaks off. Calls that reach a
server that is being stopped get 503, and every 503 says when to ask again.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from vllm_multilora.gateway.changed_answers import ChangedAnswer
from vllm_multilora.gateway.endpoints import (
    ANTHROPIC_STATUSES,
    RETRY_LATER,
    error_answer,
    header,
    route_path,
)
from vllm_multilora.integration.api_server.policy_spans import fields_of
from vllm_multilora.integration.server.requests.engine_calls import IS_STOPPING, STOP
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
_ENDED = b'"finish_reason":"'
_RESPONSES = "/v1/responses"
_WITHOUT_RESULT = (b"event: response.created", b"event: response.in_progress")


class HttpCallMiddleware:
    """Fills `current_call`, and names adapter and version in the answer, streamed ones included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        call = HttpCall(Headers(scope=scope), path=route_path(scope).rstrip("/"))
        token = current_call.set(call)
        try:
            if scope["type"] == "http":
                await self._answer(call, scope, receive, _Answer(call, send))
            else:
                await self._app(scope, receive, send)
        finally:
            current_call.reset(token)

    async def _answer(
        self, call: HttpCall, scope: Scope, receive: Receive, answer: _Answer
    ) -> None:
        stream = _Stream(call, scope, receive, answer.send)
        try:
            await self._app(scope, receive, stream.send)
        except Exception as error:
            if STOP.has_come and not answer.has_begun:
                refused = error_answer(HTTPStatus.SERVICE_UNAVAILABLE, IS_STOPPING, path=call.path)
                await refused(scope, receive, answer.send)
                return
            failure = _with_status(error)
            if failure is None or not await stream.fail(failure.http_status, failure.message):
                raise


class _Answer(ChangedAnswer):
    """An answer on its way to the client."""

    def __init__(self, call: HttpCall, send: Send) -> None:
        super().__init__(send)
        self._call = call
        self._is_complete = False  # nothing is to be added any more
        self.has_begun = self._is_named = False

    def send(self, message: Message) -> Awaitable[None]:
        """Takes a message; most are passed on without a coroutine of its own."""
        return self._send(message) if self._is_complete else self._add(message)

    async def _add(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._begin(message):
                return
        elif message["type"] == "http.response.body":
            message = self._with_parts(message if self._is_named else self._named(message))
        await self._send_all(message)

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
            self._is_named = True  # it is whole, or begins here
        if ran is None or event < 0 or body[at : at + 1] != b"{":
            return message
        self._is_named = True
        assert self._call.lora is not None  # else it would be complete
        value = {"adapter": self._call.lora.lora_name, "version": ran[:SHOWN_DIGITS]}
        field = b'"multilora":' + json.dumps(value, separators=(",", ":")).encode()
        rest = body[at + 1 :]
        named = b"".join((body[: at + 1], field, b"" if rest[:1] == b"}" else b",", rest))
        if start is not None:
            MutableHeaders(scope=start)[VERSION_HEADER] = ran[:SHOWN_DIGITS]
        return {**message, "body": named}

    def _with_parts(self, message: Message) -> Message:
        """A part of the body; the choices that end in it say which tokens are which version's."""
        parts, body = self._call.parts, message.get("body", b"")
        self._is_complete = self._is_named and (not parts or self._start is not None)
        if not parts or _ENDED not in body:
            return message
        begin, _, text = body.partition(b"{")
        text = f"{{{text.decode()}"
        answer, end = json.JSONDecoder().raw_decode(text)
        for choice in answer["choices"]:
            state = parts.get(choice["index"])
            if state is not None and choice["finish_reason"] is not None:
                choice |= fields_of(state)
        shown = json.dumps(answer, ensure_ascii=False, separators=(",", ":")) + text[end:]
        return {**message, "body": begin + shown.encode()}


@lru_cache(4_096)
def _as_header(name: str) -> bytes:
    """An adapter's name in a header, which holds ASCII and neither begins nor ends with spaces.

    Other names are percent-encoded, as in a URL.
    """
    inner_space = " " if name == name.strip() else ""
    return quote(name, safe="/:@+*" + inner_space).encode()


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
            kind = header(message["headers"], b"content-type") or b""
            is_stream = message["status"] == 200 and kind.startswith(b"text/event-stream")
            self._is_ours = is_stream and self._call.lora is not None
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
        kind = str(error.get("type"))
        status = ANTHROPIC_STATUSES.get(kind, HTTPStatus.INTERNAL_SERVER_ERROR)
    return content, status


def _failed_event(created: bytes, number: int, status: HTTPStatus, message: str) -> bytes:
    """The last event of a response; its other fields are those of the event that announced it."""
    is_servers = status >= HTTPStatus.INTERNAL_SERVER_ERROR
    code = "server_error" if is_servers else "invalid_prompt"
    error = {"code": code, "message": message, "type": status.phrase}
    response = json.loads(created.split(b"data: ", 1)[1])["response"]
    response = {**response, "status": "failed", "error": error}
    event = {"response": response, "sequence_number": number, "type": "response.failed"}
    return b"event: response.failed\ndata: " + json.dumps(event).encode() + b"\n\n"
