"""Per-request context shared by the HTTP layer and adapter resolution.

vLLM resolves a request's model name, and runs the request, far below HTTP. A context variable
reaches every task that works for the request. It carries the request's headers in one direction,
the adapter and its version in the other.
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

MOST_ERROR = 16_384
"""Characters of an error's text, which may repeat what its request holds."""
_LONG_RUN = re.compile(r"(\S{256})\S++|(\s{64})\s++")


@dataclass
class HttpCall:
    """One HTTP request, or one of a batch that a file holds.

    Attributes:
        headers: As the client sent them; names in any case.
        route: The route that the client asked for; None if it named a model.
        adapter: What the answer names: the adapter, or what a route has led to; None: nothing.
        lora: The adapter in the version that its name stood for; None for the base model.
        digest: The digest of that version, if it is known.
        invocation: Tokens of which each prompt is refused that lacks them; see `invoked_prompts`.
        asked: The digits of the digest that the client asked for; empty for any version.
        ran: The digest of the weights that have computed the answer; None before that.
        drops_blend: Whether the body asks for a blend, which the endpoint does not see.
        renders: Whether the answer is a request for `/inference/v1/generate`.
        is_http: Whether it came over HTTP.
    """

    headers: Mapping[str, str]
    route: str | None = None
    adapter: str | None = None
    lora: LoRARequest | None = None
    digest: str | None = None
    invocation: tuple[int, ...] = ()
    asked: str = ""
    ran: str | None = None
    drops_blend: bool = False
    renders: bool = False
    is_http: bool = True


current_call: ContextVar[HttpCall | None] = ContextVar("multilora_http_call", default=None)
"""The HTTP request that is being worked for; None outside of any."""


def look_for_call() -> None:
    """Has what did not come over HTTP (`vllm run-batch`, a WebSocket) be a call of its own."""
    call = current_call.get()
    if call is None or not call.is_http:
        current_call.set(HttpCall({}, is_http=False))


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
