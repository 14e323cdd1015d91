"""What a route needs of HTTP: the request's headers, and a header in the answer.

vLLM resolves a request's model name far below HTTP. What must pass between the two travels in a
context variable, which reaches every task that works for the request.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders

from vllm_multilora.config import CONFIG_KEY

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADAPTER_HEADER = "x-multilora-adapter"
"""Names, in the answer to a request for a route, the adapter that the request was led to."""


@dataclass
class RoutedCall:
    """One HTTP request.

    Attributes:
        headers: As the client sent them; names in any case.
        adapter: Where a route has led the request; None if no route has.
    """

    headers: Mapping[str, str]
    adapter: str | None = None


current_call: ContextVar[RoutedCall | None] = ContextVar("multilora_routed_call", default=None)
"""The HTTP request that is being worked for; None outside of any."""


class RoutedCallMiddleware:
    """Fills `current_call`, and names the adapter in the answer, streamed ones included.

    Args:
        app: What answers the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = RoutedCall(Headers(scope=scope))

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start" and call.adapter is not None:
                # A header holds ASCII; other names are percent-encoded, as in a URL.
                MutableHeaders(scope=message)[ADAPTER_HEADER] = quote(call.adapter, safe="/:@+ ")
            await send(message)

        token = current_call.set(call)
        try:
            await self._app(scope, receive, send_named)
        finally:
            current_call.reset(token)


def asks_for_routes(args: Namespace) -> bool:
    """Whether a server's arguments name a routes file; flags have been merged into them."""
    additional = getattr(args, "additional_config", None)
    settings = additional.get(CONFIG_KEY) if isinstance(additional, Mapping) else None
    return isinstance(settings, Mapping) and bool(settings.get("routes"))
