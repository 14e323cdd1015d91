"""Per-request context shared by the HTTP layer and adapter resolution.

vLLM runs a request far below HTTP. A context variable reaches every task that works for it, and
carries what the gateway knows of the request in one direction, what has computed it in the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

SHOWN_DIGITS = 16
"""Digits of a digest in answers."""

BLEND_FIELD = "lora_blend"
"""Field of request bodies: a weight for each adapter of a blend."""

RENDERING = "/render"
"""End of the paths of endpoints whose answers are requests for `/inference/v1/generate`."""

MOST_ERROR = 16_384
"""Characters of an error's text, which may repeat what its request holds."""
_LONG_RUN = re.compile(r"(\S{256})\S++|(\s{64})\s++")


@dataclass
class HttpCall:
    """One HTTP request, or a WebSocket.

    Attributes:
        headers: As the client sent them; names in any case.
        route: The route that the client asked for; None if it named a model.
        adapter: What the answer names: the adapter, or what a route has led to; None: nothing.
        lora: The adapter in the version that its name stood for; None for the base model.
        digest: The digest of that version, if it is known.
        asked: The digits of the digest that the client asked for; empty for any version.
        ran: The digest of the weights that have computed the answer; None before that.
        path: Its path, without the server's root path.
        is_form: Whether its body is a form.
    """

    headers: Mapping[str, str]
    route: str | None = None
    adapter: str | None = None
    lora: LoRARequest | None = None
    digest: str | None = None
    asked: str = ""
    ran: str | None = None
    path: str = ""
    is_form: bool = False

    @property
    def renders(self) -> bool:
        """Whether the answer is a request for `/inference/v1/generate`."""
        return self.path.endswith(RENDERING)


current_call: ContextVar[HttpCall | None] = ContextVar("multilora_http_call", default=None)
"""The HTTP request that is being worked for; None outside of any."""


def sanitize_message(original: Callable[[str], str], message: str) -> str:
    """Takes a machine's paths out of an error's text, in bounded time.

    vLLM looks for them while nobody is answered, and takes a thousand times as long for ten times
    as long a run of names and slashes: nine seconds for eight kilobytes.

    Args:
        original: vLLM's.
        message: Of any length; clients choose parts of it.
    """
    if current_call.get() is None:  # the plugin does not act
        return original(message)
    shown = message if len(message) <= MOST_ERROR else f"{message[:MOST_ERROR]}..."
    return original(_LONG_RUN.sub(r"\1\2...", shown))
