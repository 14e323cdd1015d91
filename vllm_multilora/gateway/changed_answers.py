"""Answers that are changed on their way to the client, with the length that they have then."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders

from vllm_multilora.gateway.endpoints import header

if TYPE_CHECKING:
    from starlette.types import Message, Send


class ChangedAnswer:
    """Passes an answer on, whose start may be held until its body, or the first part, is there."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None

    async def _hold(self, start: Message) -> None:
        self._start = start

    async def _send_all(self, message: Message) -> None:
        """Sends the start, if it is held, with the length of the body, and then a message."""
        if self._start is not None:
            start, self._start = self._start, None
            headers = MutableHeaders(scope=start)
            del headers["content-length"]
            if not message.get("more_body", False):  # else the body comes in pieces
                headers["content-length"] = str(len(message.get("body", b"")))
            await self._send(start)
        await self._send(message)


class ReplacedText(ChangedAnswer):
    """Passes an answer on with one text replaced, in its headers and in each part of its body.

    Most endpoints answer with the adapter's own name. Some repeat the name in the request, or its
    id: what vLLM was given, in ASCII. It sends each event, and each JSON, in one piece.
    """

    def __init__(self, send: Send, given: str, shown: str) -> None:
        super().__init__(send)
        self._given, self._shown = given.encode(), shown.encode()

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
