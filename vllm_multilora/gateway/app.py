"""The application that stands between clients and vLLM's own.

vLLM mounts it as it mounts any class that `--middleware` names; the plugin adds it to the server's
arguments. Without keys it leads requests to adapters, names these in answers, and does no more.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.gateway.answers import HttpCallMiddleware
from vllm_multilora.gateway.endpoints import HEALTH, error_answer, route_path
from vllm_multilora.gateway.first_errors import FirstErrors
from vllm_multilora.gateway.keys.access import Access, access_for
from vllm_multilora.gateway.keys.middleware import AccessMiddleware
from vllm_multilora.gateway.names import models_list
from vllm_multilora.gateway.names.names_middleware import NamesMiddleware
from vllm_multilora.gateway.request_ids import identified
from vllm_multilora.gateway.status import page
from vllm_multilora.gateway.status.status_route import AdaptersRoute
from vllm_multilora.gateway.stopping import listen
from vllm_multilora.integration.logs import join_vllm_logging
from vllm_multilora.integration.server.names import registration_routes
from vllm_multilora.integration.server.requests import metrics_route
from vllm_multilora.integration.server.requests.engine_calls import IS_STOPPING, STOP
from vllm_multilora.integration.server.requests.own_templates import allow_templates
from vllm_multilora.integration.server.start import start
from vllm_multilora.wording import CONTROLS

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)


class Gateway:
    """Everything of this plugin that acts on HTTP before vLLM does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._inner: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._start(scope, receive, send)
            return
        scope, send = identified(scope, send)
        path = route_path(scope)
        if STOP.has_come and (path in HEALTH or scope.get("method") == "POST"):
            answer: ASGIApp = error_answer(HTTPStatus.SERVICE_UNAVAILABLE, IS_STOPPING, path=path)
        elif CONTROLS.search(scope["path"]):
            # The pattern of a Starlette route ends in `$`, which also matches before a line break:
            # such a path would reach an endpoint as another one than it was checked as.
            message = "There is nothing at a path with control characters."
            answer = error_answer(HTTPStatus.NOT_FOUND, message, path=path)
        else:
            answer = self._for(scope["app"])
        await answer(scope, receive, send)

    async def _start(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starts with the server, and stops it where a setting cannot be used."""
        join_vllm_logging()  # uvicorn has taken its logging configuration just before
        try:
            inner = self._for(scope["app"])
            if (models := getattr(scope["app"].state, "openai_serving_models", None)) is not None:
                await start(models)
            listen()
        except Exception as error:  # uvicorn would serve without what has not started
            if not isinstance(error, MultiLoRAError):
                logger.exception("The gateway has not started.")
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await inner(scope, receive, send)

    def _for(self, server: Any) -> ASGIApp:
        """What is behind this class, made when vLLM's application is first at hand."""
        if self._inner is None:
            inner = self._app
            if (models := getattr(server.state, "openai_serving_models", None)) is not None:
                allow_templates(models.engine_client, server.state.args)
                inner = NamesMiddleware(inner, models)
            inner = HttpCallMiddleware(inner)
            access = access_for(server.state.args)
            add_routes(server, access)
            if access is not None:
                errors = FirstErrors(server.routes) if access.locks.tenants else None
                inner = AccessMiddleware(inner, access, errors)
            self._inner = inner
        return self._inner


def add_routes(server: FastAPI, access: Access | None) -> None:
    """Adds this plugin's routes to vLLM's application, behind vLLM's own checks."""
    AdaptersRoute(access).add_to(server)
    page.add_route(server)
    models_list.add_routes(server)
    metrics_route.add_routes(server)
    registration_routes.add_routes(server)
