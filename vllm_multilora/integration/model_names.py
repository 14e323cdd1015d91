"""What happens to the model name of a request before vLLM looks it up."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError

from vllm_multilora.integration import adapter_directory
from vllm_multilora.integration.routes import routes_of


async def prepare(serving: Any, request: Any) -> ErrorResponse | None:
    """Puts an adapter's name in the place of a route's, and makes sure that it is served.

    Args:
        serving: One of vLLM's handlers of a route.
        request: As the client sent it; its `model` is replaced where it is a route.

    Returns:
        The answer to a request whose adapter cannot be served; None lets vLLM go on.
    """
    routes = routes_of(serving.models)
    if routes is not None:
        refusal = await routes.lead(request)
        if refusal is not None:
            return refusal
    return await adapter_directory.prepare(serving.models, request.model)


async def prepare_or_raise(serving: Any, request: Any) -> None:
    """As `prepare`, for handlers that answer with exceptions alone.

    Raises:
        GracefulHTTPError: The adapter cannot be served; with the answer's status and message.
    """
    refusal = await prepare(serving, request)
    if refusal is not None:
        raise GracefulHTTPError(refusal.error.message, HTTPStatus(refusal.error.code))
