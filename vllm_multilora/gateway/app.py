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
from vllm_multilora.gateway.failed_streams import FailedStreamsMiddleware
from vllm_multilora.gateway.first_errors import stop_at_first_errors
from vllm_multilora.gateway.keys.access import access_for
from vllm_multilora.gateway.keys.middleware import AccessMiddleware
from vllm_multilora.gateway.names.names_middleware import NamesMiddleware
from vllm_multilora.gateway.own_routes import add_routes
from vllm_multilora.gateway.paths import route_path
from vllm_multilora.gateway.refused_answers import error_answer
from vllm_multilora.integration.logs import join_vllm_logging
from vllm_multilora.integration.server.start import start
from vllm_multilora.wording import CONTROLS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)


class Gateway:
    """Everything of this plugin that acts on HTTP before vLLM does.

    Args:
        app: What vLLM has behind this middleware.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._inner: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._start(scope, receive, send)
        elif CONTROLS.search(scope["path"]):
            # The pattern of a Starlette route ends in `$`, which also matches before a line break:
            # such a path would reach an endpoint as another one than it was checked as.
            message = "There is nothing at a path with control characters."
            answer = error_answer(HTTPStatus.NOT_FOUND, message, path=route_path(scope))
            await answer(scope, receive, send)
        else:
            await self._for(scope["app"])(scope, receive, send)

    async def _start(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starts with the server, and stops it where a setting cannot be used."""
        join_vllm_logging()  # uvicorn has taken its logging configuration just before
        try:
            inner = self._for(scope["app"])
            if (models := getattr(scope["app"].state, "openai_serving_models", None)) is not None:
                await start(models)
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
                inner = NamesMiddleware(inner, models)
            inner = HttpCallMiddleware(FailedStreamsMiddleware(inner))
            access = access_for(server.state.args)
            add_routes(server, access)
            if access is not None:
                inner = AccessMiddleware(inner, access)
                if access.locks.tenants:
                    stop_at_first_errors(server)
            self._inner = inner
        return self._inner
