"""Public names in answers, in the place of the names that vLLM has been given."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders

if TYPE_CHECKING:
    from starlette.types import Message, Send

_KINDS = ("application/json", "text/event-stream")


class PublicAnswer:
    """Passes an answer on with one name replaced, in JSON and in events.

    Most endpoints answer with the adapter's own name. Some repeat the name in the request.

    Args:
        send: Takes the answer.
        name: What vLLM was given, in ASCII. vLLM sends each event, and each JSON, in one piece.
        shown: What the client is to read.
    """

    def __init__(self, send: Send, name: str, shown: str) -> None:
        self._send = send
        self._name = name.encode()
        self._shown = json.dumps(shown)[1:-1].encode()
        self._start: Message | None = None  # held until the length of the body is known
        self._is_text = False

    async def send(self, message: Message) -> None:
        """Takes a message of the answer."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            self._is_text = headers.get("content-type", "").startswith(_KINDS)
            if self._is_text and "content-length" in headers:
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._is_text:
            body = message.get("body", b"")
            if self._name in body:
                message = {**message, "body": body.replace(self._name, self._shown)}
            if self._start is not None:
                start, self._start = self._start, None
                _set_length(start, message)
                await self._send(start)
        await self._send(message)


def _set_length(start: Message, body: Message) -> None:
    """Corrects the length in an answer's headers; removes it if the body comes in pieces."""
    headers = MutableHeaders(scope=start)
    if body.get("more_body", False):
        del headers["content-length"]
    else:
        headers["content-length"] = str(len(body.get("body", b"")))
