"""Blends in an API server: from names and weights to what the engine is asked for.

A client names the base model and, in the field `lora_blend`, adapters with a weight each; a routes
file does so under a name of its own. What that stands for is decided for each request: the blend of
the versions that the names have then. Nothing of it is kept here.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_multilora.adapters.blend import BlendError, is_blend, weights_in
from vllm_multilora.integration.blends import blended
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.names import registration
from vllm_multilora.integration.server.requests import bound_versions, callers
from vllm_multilora.integration.server.requests.http_calls import BLEND_FIELD as FIELD
from vllm_multilora.integration.server.requests.http_calls import current_call
from vllm_multilora.integration.server.settings.gateway_activation import is_active_behind

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


def is_asked(models: Any, request: Any) -> bool:
    """Whether a request asks for a blend in its body, where anybody knows what that is.

    Args:
        models: vLLM's `OpenAIServingModels`.
        request: One of vLLM's parsed requests.
    """
    asks = getattr(request, FIELD, None) is not None
    return asks and is_active_behind(getattr(models, "engine_client", None))


def is_bound(request: Any) -> bool:
    """Whether a blend is what answers one of vLLM's parsed requests: its body's, or a route's."""
    lora = bound_versions.bound(request)
    return lora is not None and is_blend(lora.lora_path)


def dropped() -> ErrorResponse | None:
    """The answer where the body asks for a blend and the endpoint has not seen it; else None."""
    call = current_call.get()
    if call is None or not call.drops_blend:
        return None
    return error_response(f"{FIELD} is not taken here: ask for a route that leads to the blend.")


def why_none(models: Any) -> str | None:
    """Why a server blends nothing; None if it does."""
    if not registration.acts_for(models):
        return "vLLM's own kernels (--multilora-backend vllm) blend nothing"
    if not settings_of(models.engine_client.vllm_config).max_blends:
        return "blends are switched off here (--multilora-max-blends 0)"
    return None


def weights_of(models: Any, request: Any) -> dict[str, float] | ErrorResponse:
    """The weights in a request's body, by name; or the answer where they are none.

    Args:
        models: vLLM's `OpenAIServingModels`.
        request: One that asks for a blend.
    """
    try:
        weights = weights_in(getattr(request, FIELD))
    except BlendError as error:
        return error_response(f"{FIELD}: {error}.")
    if (fault := why_none(models)) is not None:
        return error_response(f"{FIELD}: {fault}.")
    if request.model and not models.is_base_model(request.model):
        return error_response(
            f"{FIELD} goes with the base model's name: found the model `{request.model}`, expected "
            f"`{models.base_model_paths[0].name}`.",
            param="model",
        )
    for name in weights:
        if models.is_base_model(name):
            return error_response(f"{FIELD}: found the base model `{name}`, expected adapters.")
    return weights


def blend_now(models: Any, weights: Iterable[tuple[str, float]]) -> LoRARequest | None:
    """The blend of the versions that names stand for now; None if one stands for none any more."""
    found = [(models.lora_requests.get(name), weight) for name, weight in weights]
    parts = [(lora, weight) for lora, weight in found if lora is not None]
    return blended(parts) if len(parts) == len(found) else None


def bind(request: Any, blend: LoRARequest) -> None:
    """Has a blend answer the HTTP request at hand, and its answer name the blend."""
    request.model = blend.lora_name
    call = current_call.get()
    assert call is not None
    call.adapter, call.lora = blend.lora_name, blend


def error_response(message: str, *, param: str = FIELD) -> ErrorResponse:
    """The answer to a request for what is no blend."""
    return callers.error_response(HTTPStatus.BAD_REQUEST, message, param)
