"""From the model's name in a request's body to the adapter that is to answer the request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest

from vllm_multilora.adapters.blend import BLEND_FIELD, BlendError, weights_in
from vllm_multilora.adapters.served_names import name_fault
from vllm_multilora.integration.server.names import (
    blend_names,
    public_names,
    registration,
    resolvers,
)
from vllm_multilora.integration.server.names.routes import ROUTES
from vllm_multilora.integration.server.requests import http_calls
from vllm_multilora.integration.server.requests.callers import current_caller, error_response
from vllm_multilora.integration.server.requests.metering import METER
from vllm_multilora.tenants.rules import INVOCATIONS

if TYPE_CHECKING:
    from vllm_multilora.integration.server.requests.http_calls import HttpCall

TAKE_DEFAULTS = ("/chat/completions", "/v1/messages", INVOCATIONS)
"""Ends of the paths where vLLM applies default adapters."""


@dataclass(frozen=True)
class Chosen:
    """What is to answer a request.

    Attributes:
        name: What the request's `model` has to be for vLLM, where it is no adapter that the plugin
            manages; None leaves it as the client has sent it.
        lora: The adapter, in its version; None for all else.
        rendered: What `/render` calls the adapter, for `/inference/v1/generate` to take.
    """

    name: str | None = None
    lora: LoRARequest | None = None
    rendered: str = ""


async def choose(
    call: HttpCall, models: Any, name: str | None, fields: Mapping[str, Any]
) -> Chosen | ErrorResponse:
    """Finds what is to answer a request with some fields, and makes sure that it is served.

    The call learns which adapter answers it.
    """
    try:
        if fields.get(BLEND_FIELD) is not None:
            return await _choose_blend(call, models, name, fields)
        return await _choose(call, models, name, fields)
    except GracefulHTTPError as error:
        return error_response(HTTPStatus(error.http_status), str(error), "model")


async def may_use(models: Any, name: str | None) -> bool:
    """Whether whoever asks may use a model, if there is one of this name.

    Whether the name is a route's is looked up here: until the request is led, nothing changes that.
    """
    caller = current_caller.get()
    routes, tenant = ROUTES.get(models), None if caller is None else caller.tenant
    if routes is not None and (tenant is None or tenant.mentions(name)):
        await routes.look_for(name)
    if caller is None:
        return True
    is_base = not name or public_names.is_base_model(models, name)
    return caller.may_use(name, is_base=is_base, is_route=name in (routes or ()))


def unknown(models: Any, name: str | None) -> ErrorResponse:
    """The answer of vLLM to a request for a model that does not exist."""
    return error_response(HTTPStatus.NOT_FOUND, registration.no_such_model(models, name), "model")


async def _choose(
    call: HttpCall, models: Any, model: str | None, fields: Mapping[str, Any]
) -> Chosen | ErrorResponse:
    routes, caller, acts = ROUTES.get(models), current_caller.get(), acts_for(models)
    served = public_names.public_names(models)

    def is_name(name: str) -> bool:
        return models.is_base_model(name) or name in (routes or ())

    name, asked = model or "", ""
    if acts and model:
        name, asked = http_calls.split(model, served, is_name=is_name)
    if not await may_use(models, name):
        return unknown(models, model)  # whole: whether there is such a name decides what is asked
    led = None if routes is None else await routes.lead(name, fields)
    if isinstance(led, ErrorResponse):
        return _as_shown(led, models, name)
    if isinstance(led, LoRARequest):
        return _answered_by(call, models, led, asked, rendered=name)
    name = led or name
    lora, is_base = None, not name or public_names.is_base_model(models, name)
    if is_base and acts:
        messages = fields.get("messages") if public_names.defaults_of(models) else None
        defaults = _kinds_in(messages).intersection(public_names.defaults_of(models), served)
        for default in defaults:
            if caller is not None and (refusal := caller.grant(default)) is not None:
                return refusal
        is_one = len(defaults) == 1 and not any(isinstance(each, list) for each in messages or ())
        if is_one and call.path.endswith(TAKE_DEFAULTS):
            lora = served[min(defaults)]  # which vLLM applies to it
    elif not is_base:
        refusal = await _find(models, name)
        is_unknown = refusal is not None and refusal.error.code == HTTPStatus.NOT_FOUND
        takes_any = name not in served and takes_any_name()
        if refusal is not None and not (is_unknown and takes_any):
            return _as_shown(refusal, models, name)
        lora = served.get(name) if acts else None
        if lora is None and acts and not takes_any:
            return unknown(models, name)
    if caller is not None:
        if is_base or (call.is_form and not fields.get("language")):
            caller.grant(None)  # the base model says to vLLM which language a recording is in
        if not is_base and lora is None and (refusal := caller.grant(name)) is not None:
            return refusal
    if lora is not None:
        rendered = f"{name}@{asked}" if asked else lora.lora_name
        return _answered_by(call, models, lora, asked, rendered=rendered)
    if (refusal := http_calls.bind(call, models, name, None, asked)) is not None:
        return refusal
    return Chosen(led)


def _answered_by(
    call: HttpCall, models: Any, lora: LoRARequest, asked: str, *, rendered: str
) -> Chosen | ErrorResponse:
    caller = current_caller.get()
    if caller is not None and (refusal := caller.grant(lora.lora_name)) is not None:
        return refusal
    refusal = http_calls.bind(call, models, lora.lora_name, lora, asked)
    return Chosen(None, lora, rendered) if refusal is None else refusal


async def _choose_blend(
    call: HttpCall, models: Any, model: str | None, fields: Mapping[str, Any]
) -> Chosen | ErrorResponse:
    """The blend that a request's body asks for; as `choose`."""
    refusal = partial(error_response, HTTPStatus.BAD_REQUEST, param=BLEND_FIELD)
    if call.renders or call.is_form:
        return refusal(f"{BLEND_FIELD} is not taken here: ask for a route that leads to the blend.")
    try:
        weights = weights_in(fields.get(BLEND_FIELD))
    except BlendError as error:
        return refusal(f"{BLEND_FIELD}: {error}.")
    if (fault := blend_names.why_none(models)) is not None:
        return refusal(f"{BLEND_FIELD}: {fault}.")
    if model and not public_names.is_base_model(models, model):
        base = models.base_model_paths[0].name
        found = f"found the model `{model}`, expected `{base}`"
        return refusal(f"{BLEND_FIELD} goes with the base model's name: {found}.", param="model")
    for name in weights:
        if public_names.is_base_model(models, name):
            return refusal(f"{BLEND_FIELD}: found the base model `{name}`, expected adapters.")
    served = public_names.public_names(models)
    for name in weights:
        if not await may_use(models, name):
            return unknown(models, name)
        if name in (ROUTES.get(models) or ()):
            return refusal(f"{BLEND_FIELD}: found the route `{name}`, expected adapters.")
        if (answer := await _find(models, name)) is not None:
            return _as_shown(answer, models, name)
        if name not in served:
            return unknown(models, name)
    blend = blend_names.blend_now(models, weights.items())
    if blend is None:  # a part was unloaded while another one was looked for
        return unknown(models, next(name for name in weights if name not in served))
    return _answered_by(call, models, blend, "", rendered=blend.lora_name)


async def _find(models: Any, name: str) -> ErrorResponse | None:
    """As `resolvers.find`, which is not asked for what no adapter can be called."""
    is_served = name in public_names.public_names(models)
    if not is_served and registration.acts_for(models) and (fault := name_fault(name)) is not None:
        return registration.no_such_name(name, fault, "model")
    return await resolvers.find(models, name)


def _kinds_in(messages: Any) -> set[str]:
    """The kinds of the parts of messages, `image` of `image_url` say, as vLLM tells them."""
    found: set[str] = set()
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, list):  # a chat of a batch
            found |= _kinds_in(message)
            continue
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str):
                found.add(kind.split("_")[0])
    return found


def _as_shown(refusal: ErrorResponse, models: Any, name: str) -> ErrorResponse:
    """A refusal as its caller may see it; others may be shown the same object."""
    if (caller := current_caller.get()) is None:
        return refusal
    lora = public_names.public_names(models).get(name)
    folder = None if lora is None else lora.lora_path
    shown = refusal.model_copy(deep=True)
    shown.error.message = caller.shown(shown.error.message, folder)
    if isinstance(shown.error, registration.AdapterErrorInfo):
        shown.error.problems = [
            problem.with_texts(lambda text: caller.shown(text, folder))
            for problem in shown.error.problems
        ]
    return shown


def takes_any_name() -> bool:
    """Whether the base model answers to names that are no adapter's."""
    return bool(envs.VLLM_SKIP_MODEL_NAME_VALIDATION)


def acts_for(models: Any) -> bool:
    """Whether the plugin manages the adapters of a server that has started."""
    # Asked for each request. A server that only renders prompts has no engine.
    client = getattr(models, "engine_client", None)
    return METER.get(getattr(client, "output_processor", None)) is not None
