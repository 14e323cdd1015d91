"""Gives every call an id, by which its answer is found in the server's log and in the usage log.

It is the client's own `X-Request-Id`, or a new one. Answers have it in that header, and Anthropic's
also in `request-id`; errors in JSON have it as the field `request_id`, too.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from vllm_multilora.gateway.changed_answers import ChangedAnswer
from vllm_multilora.gateway.endpoints import header, is_anthropics, route_path

if TYPE_CHECKING:
    from starlette.types import Message, Scope, Send

HEADER = b"x-request-id"
_ANTHROPIC_HEADER = b"request-id"
_KEY = "multilora.request_id"


def identified(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """A call that has an id, and what takes its answer."""
    found = id_of(scope)
    return {**scope, _KEY: found}, _Answer(found, route_path(scope), send).send


def id_of(scope: Scope) -> bytes:
    """The call's id; a new one where neither the client nor the gateway has given it any."""
    found: bytes | None = header(scope["headers"], HEADER) or scope.get(_KEY)
    return found or uuid.uuid4().hex.encode()


def for_vllm(scope: Scope) -> Scope:
    """A call whose id vLLM makes the request's, unless the body has a `request_id` of its own."""
    return with_id(scope, id_of(scope))


def with_id(scope: Scope, request_id: bytes) -> Scope:
    """A call with a request's id in its header, in the place of any other."""
    headers = [pair for pair in scope["headers"] if pair[0] != HEADER]
    return {**scope, "headers": [*headers, (HEADER, request_id)]}


class _Answer(ChangedAnswer):
    """An answer on its way, to which the id is added."""

    def __init__(self, request_id: bytes, path: str, send: Send) -> None:
        self._id = request_id
        self._headers = (HEADER, _ANTHROPIC_HEADER) if is_anthropics(path) else (HEADER,)
        super().__init__(send)

    def send(self, message: Message) -> Awaitable[None]:
        """Takes a message; most are passed on without a coroutine of its own."""
        if message["type"] == "http.response.start":
            return self._begin(message)
        return self._send(message) if self._start is None else self._send_error(message)

    async def _begin(self, start: Message) -> None:
        pairs = list(start["headers"])
        pairs += [(name, self._id) for name in self._headers if header(pairs, name) is None]
        start = {**start, "headers": pairs}
        is_json = (header(pairs, b"content-type") or b"").startswith(b"application/json")
        is_error = start["status"] >= 400 and is_json
        await (self._hold(start) if is_error else self._send(start))

    async def _send_error(self, message: Message) -> None:
        body = message.get("body", b"")
        is_whole = not message.get("more_body", False)
        if is_whole and body[:2] == b'{"' and body[-1:] == b"}":
            quoted = json.dumps(self._id.decode("latin-1")).encode()
            message = {**message, "body": b'%s,"request_id":%s}' % (body[:-1], quoted)}
        await self._send_all(message)
