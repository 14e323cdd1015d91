"""Bounds what comes of a request before anybody has looked for a key."""

from __future__ import annotations

import importlib.util
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_multilora.integration.server.access import ACCESS

_REFUSED = "Invalid HTTP request received."
"""As uvicorn says it."""

MOST_PARTS = 65_536
"""Parts in which a body may come, of any length: each takes a microsecond, with nobody's turn
between those that have arrived together."""

LEAST_BYTES = 64
"""Of a body, for each further part."""


async def serve(
    original: Callable[..., Awaitable[Any]], app: Any, *args: Any, **kwargs: Any
) -> Any:
    """Has a server with keys bound heads of requests where uvicorn reads them by httptools.

    That has no limits: a header of twenty megabytes takes it seconds, in which nobody is answered,
    and a gigabyte of short ones ends the server. vLLM's two limits are h11's alone, which uvicorn
    takes where it has no httptools.
    """
    if ACCESS.get(app) is not None and importlib.util.find_spec("httptools") is not None:
        kwargs.setdefault("http", _bounded_protocol())
    return await original(app, *args, **kwargs)


def _bounded_protocol() -> Any:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class BoundedHeads(HttpToolsProtocol):
        """uvicorn's protocol, with vLLM's limits of heads.

        What has come since a request began, or since the last part of its body, counts: headers,
        and those that come after a body. So do the parts of a body, where they are short.
        """

        config: Any  # vLLM has added a limit
        _piece = _size = _count = _parts = _bytes = 0

        def data_received(self, data: bytes) -> None:
            self._piece = len(data)
            super().data_received(data)
            self._size += len(data)
            is_large = self._size > self.config.h11_max_incomplete_event_size
            if is_large and not self.transport.is_closing():
                self.send_400_response(_REFUSED)

        def on_message_begin(self) -> None:
            self._size = -self._piece
            self._count = self._parts = self._bytes = 0
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count += 1
            if self._count > self.config.h11_max_header_count:
                raise ValueError("there are too many headers")  # uvicorn refuses the request
            super().on_header(name, value)

        def on_body(self, body: bytes) -> None:
            self._size = -self._piece
            self._parts += 1
            self._bytes += len(body)
            if self._parts > MOST_PARTS + self._bytes // LEAST_BYTES:
                raise ValueError("there are too many short parts")
            super().on_body(body)

    return BoundedHeads
