"""`GET /v1/models` with adapters' digests and with routes, as each caller may see it.

The route takes the place of vLLM's own in vLLM's application, behind its check of the API key.
vLLM has none for `GET /v1/models/NAME`, which clients' libraries call.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from vllm_multilora.adapters.problems import shown_name
from vllm_multilora.gateway.endpoints import error_answer
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.server.names.public_names import is_base_model, public_names
from vllm_multilora.integration.server.names.routes import ROUTES
from vllm_multilora.integration.server.requests.callers import Caller, current_caller

MODELS = "/v1/models"


def add_routes(server: FastAPI) -> None:
    routes = server.router.routes
    for path, show in (MODELS + "/{name:path}", show_model), (MODELS, show_models):
        server.add_api_route(path, show, methods=["GET"], include_in_schema=False)
        routes.insert(0, routes.pop())


async def show_models(raw_request: Request) -> JSONResponse:
    shown = await models_for(current_caller.get(), raw_request.app.state.openai_serving_models)
    return JSONResponse(shown.model_dump())


async def show_model(raw_request: Request, name: str) -> Response:
    """Answers with one of them; 404 where the caller may see none of that name."""
    models = raw_request.app.state.openai_serving_models
    shown = await models_for(current_caller.get(), models, adapters=(name,))
    for card in shown.data:
        if card.id == name:
            return JSONResponse(card.model_dump())
    message = f"The model `{shown_name(name)}` does not exist."
    return error_answer(HTTPStatus.NOT_FOUND, message, path=MODELS, param="model")


async def models_for(
    caller: Caller | None, models: Any, adapters: Iterable[str] | None = None
) -> Any:
    """Returns vLLM's list of models as a caller may see it; None asks where no keys are set.

    `adapters` are those that may be in it; None: all that are served.
    """
    tenant = None if caller is None else caller.tenant
    seen, served = copy(models), public_names(models)
    # A line takes longer to make than many requests take to read, and nobody is answered meanwhile.
    # So a tenant's list must not take time for thousands of others' adapters.
    seen.lora_requests = {
        name: served[name]
        for name in (served if adapters is None else adapters)
        if name in served and (tenant is None or name in tenant.adapters)
    }
    shown = await seen.show_available_models()
    max_model_len = next((card.max_model_len for card in shown.data if card.max_model_len), None)
    for card in shown.data:
        lora = served.get(card.id)
        if lora and (version := registered_versions.find(models.engine_client, lora)):
            card.digest, card.created = version.digest, int(version.loaded)
            card.kind = version.kind
    cards = [
        card_for(caller, card, is_base=card.parent is None, is_route=False)
        for card in shown.data
        if card.parent is not None or is_base_model(models, card.id)
    ]
    led = [] if (routes := ROUTES.get(models)) is None else await routes.cards(caller)
    cards += [card_for(caller, card, is_base=False, is_route=True) for card in led]
    # The base model's length is its adapters' too; vLLM says None of these.
    length = {"max_model_len": max_model_len}
    shown.data = [card.model_copy(update=length) for card in cards if card is not None]
    return shown


def card_for(caller: Caller | None, card: Any, *, is_base: bool, is_route: bool) -> Any | None:
    """Returns a line of the list as a caller may see it; None where it may not."""
    if caller is None:
        return card
    if not caller.may_use(card.id, is_base=is_base, is_route=is_route):
        return None
    # `root` is the folder of an adapter, and often of the base model.
    return card.model_copy(update={"root": card.id}) if caller.hides_folders else card
