"""The version of its adapter that each HTTP request is bound to.

A client may ask for a specific version with the model name `name@digits`, the first digits of the
digest of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_multilora.adapters.served_names import MOST_NAME_BYTES
from vllm_multilora.integration.api_server.registered_versions import Version, find
from vllm_multilora.integration.server.requests import invoked_prompts
from vllm_multilora.integration.server.requests.callers import error_response
from vllm_multilora.integration.server.requests.http_calls import SHOWN_DIGITS, current_call

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

GRACE_S = 5.0
"""How long a request may be on its way from its adapter's name to the engine."""

_ASKS = re.compile(r"(?s)(.+)@([0-9a-f]{8,64})")
_MOST_CHARACTERS = MOST_NAME_BYTES + 1 + 64


def take_asked(models: Any, request: Any, *, is_name: Callable[[str], bool]) -> str:
    """Takes the version out of a request's model name.

    Args:
        models: vLLM's `OpenAIServingModels`.
        request: One of vLLM's parsed requests; its `model` is the name alone afterwards.
        is_name: Whether something is a served name as it is.

    Returns:
        The digits that were asked for; none where any version will do.
    """
    name = request.model
    is_short = name and len(name) <= _MOST_CHARACTERS  # nobody is answered while it is looked at
    found = _ASKS.fullmatch(name) if is_short and "@" in name else None
    if found is None or name in models.lora_requests or is_name(name):
        return ""
    request.model = found[1]
    return found[2]


def bind(models: Any, request: Any, asked: str) -> ErrorResponse | None:
    """Binds the HTTP request at hand to the version that its model's name stands for now.

    Returns:
        The answer to a request for a version that is not the one that is served.
    """
    lora = bound(request) or models.lora_requests.get(request.model)
    version = None if lora is None else find(models.engine_client, lora)
    if asked and (version is None or not version.digest.startswith(asked)):
        return _not_served(request.model, asked, version, is_adapter=lora is not None)
    if lora is not None:
        _answers(models, lora, asked)
        if (call := current_call.get()) is not None:
            invoked_prompts.expect(call, request, version)
    return None


def _answers(models: Any, lora: LoRARequest, asked: str = "") -> None:
    """An adapter is what answers the HTTP request at hand, if there is one."""
    call = current_call.get()
    if call is not None:
        version = find(models.engine_client, lora)
        call.adapter, call.lora, call.asked = lora.lora_name, lora, asked
        call.digest = None if version is None else version.digest


def bound(request: Any) -> LoRARequest | None:
    """The adapter, in its version, that the HTTP request at hand is bound to."""
    call = current_call.get()
    if call is None or call.lora is None or call.lora.lora_name != request.model:
        return None
    return call.lora


def _not_served(
    name: str, asked: str, version: Version | None, *, is_adapter: bool
) -> ErrorResponse:
    status = HTTPStatus.CONFLICT if is_adapter else HTTPStatus.NOT_FOUND
    if version is not None:
        what = f"is served in version {version.digest[:SHOWN_DIGITS]}"
    else:
        what = "has not been read yet" if is_adapter else "is no adapter, and has no versions"
    message = f"The model `{name}` {what}; version {asked} was asked for."
    return error_response(status, message, "model")


def maybe_get_adapters(
    original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    lora = bound(request)
    if lora is not None:
        return lora
    lora = original(serving, request, *args, **kwargs)
    if lora is not None and lora.lora_name != request.model:  # a default one, for images say
        _answers(serving.models, lora)
    return lora
