"""HTTP requests, as code far below HTTP finds them, and the versions that they are bound to.

A client may ask for a specific version with the model name `name@digits`, the first digits of the
digest of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_multilora.adapters.served_names import MAX_NAME_BYTES
from vllm_multilora.integration.api_server.registered_versions import find
from vllm_multilora.integration.server.requests.callers import error_response

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

GRACE_S = 5.0
"""How long a request may be on its way from its adapter's name to the engine."""

_ASKS = re.compile(r"(?s)(.+)@([0-9a-f]{8,64})")
_MAX_CHARACTERS = MAX_NAME_BYTES + 1 + 64

SHOWN_DIGITS = 16
"""Digits of a digest in answers."""

MAX_ERROR = 16_384
"""Characters of an error's text, which may repeat what its request holds."""
_LONG_RUN = re.compile(r"(\S{256})\S++|(\s{64})\s++")


def split(
    model: str, served: Collection[str], *, is_name: Callable[[str], bool]
) -> tuple[str, str]:
    """Splits a request's model name into a name and the digits of the version that it asks for.

    There are none where any version will do. Adapters, and what else is a name, are served.
    """
    is_short = len(model) <= _MAX_CHARACTERS  # nobody is answered while it is looked at
    found = _ASKS.fullmatch(model) if is_short and "@" in model else None
    if found is None or model in served or is_name(model):
        return model, ""
    return found[1], found[2]


def bind(
    call: HttpCall, models: Any, name: str, lora: LoRARequest | None, asked: str
) -> ErrorResponse | None:
    """Binds an HTTP request to the version of an adapter, or to the base model by None.

    Returns:
        The answer to a request for a version that is not the one that is served.
    """
    version = None if lora is None else find(models.engine_client, lora)
    if asked and (version is None or not version.digest.startswith(asked)):
        status = HTTPStatus.NOT_FOUND if lora is None else HTTPStatus.CONFLICT
        if version is not None:
            what = f"is served in version {version.digest[:SHOWN_DIGITS]}"
        else:
            what = "is no adapter, and has no versions" if lora is None else "has not been read yet"
        message = f"The model `{name}` {what}; version {asked} was asked for."
        return error_response(status, message, "model")
    if lora is not None:
        call.adapter, call.lora, call.asked = lora.lora_name, lora, asked
        call.digest = None if version is None else version.digest
    return None


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
        return self.path.endswith("/render")


current_call: ContextVar[HttpCall | None] = ContextVar("multilora_http_call", default=None)
"""The HTTP request that is being worked for; None outside of any."""


def sanitize_message(original: Callable[[str], str], message: str) -> str:
    """Takes a machine's paths out of an error's text, parts of which clients choose.

    vLLM looks for them while nobody is answered, and takes a thousand times as long for ten times
    as long a run of names and slashes: nine seconds for eight kilobytes.
    """
    if current_call.get() is None:  # the plugin does not act
        return original(message)
    shown = message if len(message) <= MAX_ERROR else f"{message[:MAX_ERROR]}..."
    return original(_LONG_RUN.sub(r"\1\2...", shown))
