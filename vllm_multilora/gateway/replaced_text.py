"""What clients may read in answers, in the place of what vLLM has been given."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders

from vllm_multilora.gateway.endpoints import header

if TYPE_CHECKING:
    from starlette.types import Message, Send


class ReplacedText:
    """Passes an answer on with one text replaced, in its headers and in each part of its body.

    Most endpoints answer with the adapter's own name. Some repeat the name in the request, or its
    id.

    Args:
        send: Takes the answer.
        given: What vLLM was given, in ASCII. vLLM sends each event, and each JSON, in one piece.
        shown: What the client is to read.
    """

    def __init__(self, send: Send, given: str, shown: str) -> None:
        self._send = send
        self._given = given.encode()
        self._shown = json.dumps(shown)[1:-1].encode()
        self._start: Message | None = None  # held until the length of the body is known

    def send(self, message: Message) -> Awaitable[None]:
        """Takes a message of the answer; most are passed on without a coroutine of its own."""
        if message["type"] == "http.response.body":
            body = message.get("body", b"")
            if self._given in body:
                message = {**message, "body": body.replace(self._given, self._shown)}
            return self._send(message) if self._start is None else self._send_all(message)
        if message["type"] == "http.response.start":
            pairs = message["headers"]
            pairs = [(name, value.replace(self._given, self._shown)) for name, value in pairs]
            message = {**message, "headers": pairs}
            if header(pairs, b"content-length") is not None:
                return self._hold(message)
        return self._send(message)

    async def _hold(self, start: Message) -> None:
        self._start = start

    async def _send_all(self, message: Message) -> None:
        assert self._start is not None
        start, self._start = self._start, None
        _set_length(start, message)
        await self._send(start)
        await self._send(message)


def _set_length(start: Message, body: Message) -> None:
    """Corrects the length in an answer's headers; removes it if the body comes in pieces."""
    headers = MutableHeaders(scope=start)
    del headers["content-length"]
    if not body.get("more_body", False):
        headers["content-length"] = str(len(body.get("body", b"")))
