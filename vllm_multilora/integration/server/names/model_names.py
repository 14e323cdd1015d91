"""What happens to the model name of a request before vLLM looks it up."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from vllm import envs
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError

from vllm_multilora.adapters.served_names import name_fault
from vllm_multilora.integration.server.names import blend_names, multimodal, registration, resolvers
from vllm_multilora.integration.server.names.routes import ROUTES
from vllm_multilora.integration.server.requests import bound_versions
from vllm_multilora.integration.server.requests.callers import Caller, current_caller
from vllm_multilora.integration.server.requests.http_calls import (
    BLEND_FIELD,
    current_call,
    look_for_call,
)
from vllm_multilora.integration.server.requests.metering import METER

_GENERATES = "Blends of adapters are served by endpoints that generate, not by this one."


async def may_use(serving: Any, name: str | None) -> bool:
    """Whether whoever asks may use a model, if there is one of this name.

    Whether the name is a route's is looked up here: until `prepare` nothing changes that.
    """
    models, caller = serving.models, current_caller.get()
    routes, tenant = ROUTES.get(models), None if caller is None else caller.tenant
    if routes is not None and (tenant is None or tenant.mentions(name)):
        await routes.look_for(name)
    if caller is None:
        return True
    is_base = not name or models.is_base_model(name)
    return caller.may_use(name, is_base=is_base, is_route=name in (routes or ()))


def unknown(serving: Any, name: str | None) -> ErrorResponse:
    """The answer of vLLM to a request for a model that does not exist."""
    answer: ErrorResponse = serving.create_error_response(
        message=registration.no_such_model(serving.models, name),
        err_type="NotFoundError",
        status_code=HTTPStatus.NOT_FOUND,
        param="model",
    )
    return answer


async def prepare(serving: Any, request: Any) -> ErrorResponse | None:
    """Puts an adapter's name in the place of a route's, and makes sure that it is served.

    Args:
        serving: One of vLLM's handlers of a route.
        request: As the client sent it, for a model that it may use; its `model` is replaced where
            it is a route.

    Returns:
        The answer to a request whose adapter cannot be served; None lets vLLM go on.
    """
    refusal = await _prepare(serving.models, request)
    caller = current_caller.get()
    if caller is None:
        return refusal
    if refusal is not None:
        return _as_shown(refusal, caller, serving.models, request.model)
    if _lacks_language(request):
        caller.grant(None)  # the base model says to vLLM which language a recording is in
    name = request.model
    if name and not serving.models.is_base_model(name):
        return caller.grant(name)
    caller.grant(None)
    for default in multimodal.default_adapters(serving, request):
        if (refusal := caller.grant(default)) is not None:
            return refusal
    return None


def _lacks_language(request: Any) -> bool:
    """Whether it is a recording without its language; any request may have a field so named."""
    return "language" in getattr(type(request), "model_fields", ()) and request.language is None


async def _prepare(models: Any, request: Any) -> ErrorResponse | None:
    routes = ROUTES.get(models)
    if routes is not None:
        refusal = await routes.lead(request)
        if refusal is not None:
            return refusal
    name = request.model
    if not name or models.is_base_model(name):
        return None
    refusal = await _find(models, name)
    is_unknown = refusal is not None and refusal.error.code == HTTPStatus.NOT_FOUND
    if is_unknown and envs.VLLM_SKIP_MODEL_NAME_VALIDATION and name not in models.lora_requests:
        return None  # it is the base model's, as all are there that are no adapter's
    return refusal


async def _find(models: Any, name: str) -> ErrorResponse | None:
    """As `resolvers.find`, which is not asked for what no adapter can be called."""
    is_served = name in models.lora_requests
    if not is_served and registration.acts_for(models) and (fault := name_fault(name)) is not None:
        return registration.no_such_name(name, fault, "model")
    return await resolvers.find(models, name)


def _as_shown(
    refusal: ErrorResponse, caller: Caller, models: Any, name: str | None
) -> ErrorResponse:
    """A refusal as its caller may see it; others may be shown the same object."""
    lora = models.lora_requests.get(name)
    folder = None if lora is None else lora.lora_path
    shown = refusal.model_copy(deep=True)
    shown.error.message = caller.shown(shown.error.message, folder)
    if isinstance(shown.error, registration.AdapterErrorInfo):
        shown.error.problems = [
            problem.with_texts(lambda text: caller.shown(text, folder))
            for problem in shown.error.problems
        ]
    return shown


def take_asked(serving: Any, request: Any) -> str:
    """The version that a request asks for, which is taken out of its model's name."""
    models = serving.models
    if not _acts_for(models):
        return ""
    routes = ROUTES.get(models) or ()
    return bound_versions.take_asked(
        models, request, is_name=lambda name: models.is_base_model(name) or name in routes
    )


def bind(serving: Any, request: Any, asked: str) -> ErrorResponse | None:
    """See `versions.bind`; does nothing where the plugin does not act."""
    return (
        bound_versions.bind(serving.models, request, asked) if _acts_for(serving.models) else None
    )


def _acts_for(models: Any) -> bool:
    # Asked for each request: what the server has been given when it started says so at once. A
    # server that only renders prompts has no engine.
    client = getattr(models, "engine_client", None)
    return METER.get(getattr(client, "output_processor", None)) is not None


async def _prepare_blend(serving: Any, request: Any) -> ErrorResponse | None:
    """Puts the blend that a request's body asks for in the base model's place; as `prepare`."""
    models, caller = serving.models, current_caller.get()
    weights = blend_names.weights_of(models, request)
    if isinstance(weights, ErrorResponse):
        return weights
    for name in weights:
        if not await may_use(serving, name):
            return unknown(serving, name)
        if name in (ROUTES.get(models) or ()):
            return blend_names.error_response(
                f"{BLEND_FIELD}: found the route `{name}`, expected adapters."
            )
        refusal = await _find(models, name)
        if refusal is not None:
            return refusal if caller is None else _as_shown(refusal, caller, models, name)
        if name not in models.lora_requests:
            return unknown(serving, name)
    blend = blend_names.blend_now(models, weights.items())
    if blend is None:  # a part was unloaded while another one was looked for
        return unknown(serving, next(name for name in weights if name not in models.lora_requests))
    refusal = None if caller is None else caller.grant(blend.lora_name)
    if refusal is None:
        blend_names.bind(request, blend)
    return refusal


async def check_model(original: Callable[..., Any], serving: Any, request: Any) -> Any:
    look_for_call()
    if blend_names.is_bound(request):
        return None  # by a look before this one
    if (refusal := blend_names.dropped()) is not None and _acts_for(serving.models):
        return refusal
    if blend_names.is_asked(serving.models, request):
        refusal = await _prepare_blend(serving, request)
        return refusal if refusal is not None else bind(serving, request, "")
    named, asked = request.model, take_asked(serving, request)
    if not await may_use(serving, request.model):
        return unknown(serving, named)  # whole: whether there is such a name decides what is taken
    refusal = await prepare(serving, request)
    if refusal is None and not blend_names.is_bound(request):
        refusal = await original(serving, request)
    if refusal is None:
        refusal = bind(serving, request, asked)
    if refusal is None:
        _name_rendered(request, asked)
    return refusal


def _name_rendered(request: Any, asked: str) -> None:
    """Has a rendered request name the version that was asked for, and a blend by its route."""
    call = current_call.get()
    if call is None or not call.renders:
        return
    if blend_names.is_bound(request):
        request.model = call.route
    elif asked:
        request.model = f"{request.model}@{asked}"


def check_realtime_model(original: Callable[..., Any], connection: Any, model: str) -> Any:
    """Checks the model that a WebSocket session names: only the base model answers there."""
    serving = connection.serving
    models = serving.models
    if not _acts_for(models):
        return original(connection, model)
    look_for_call()
    connection._is_model_validated = False  # vLLM validates what is not refused
    served = (models.lora_requests, ROUTES.get(models) or ())
    if not isinstance(model, str) or not any(model in names for names in served):
        return original(connection, model)
    base = models.base_model_paths[0].name
    return serving.create_error_response(
        message=f"/v1/realtime serves no adapters: found the model `{model}`, expected `{base}`.",
        param="model",
    )


async def check_pooling_model(original: Callable[..., Any], serving: Any, request: Any) -> Any:
    look_for_call()
    is_dropped = blend_names.dropped() is not None and _acts_for(serving.models)
    if is_dropped or blend_names.is_asked(serving.models, request):
        raise GracefulHTTPError(_GENERATES, HTTPStatus.BAD_REQUEST)
    if (caller := current_caller.get()) is not None:
        caller.expect_results(request)
    named, asked = request.model, take_asked(serving, request)
    if not await may_use(serving, request.model):
        # As vLLM does, which looks names up in two places here; and whole, as in `check_model`.
        raise VLLMNotFoundError(f"The model `{named}` does not exist.")
    refusal = await prepare(serving, request)
    if refusal is None and blend_names.is_bound(request):
        raise GracefulHTTPError(_GENERATES, HTTPStatus.BAD_REQUEST)
    if refusal is None:
        answer = await original(serving, request)
        refusal = bind(serving, request, asked)
    if refusal is not None:
        # These handlers answer with exceptions alone.
        raise GracefulHTTPError(refusal.error.message, HTTPStatus(refusal.error.code))
    return answer
