"""vLLM's WebSocket, `/v1/realtime`: the base model answers there, and nobody who names another."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vllm_multilora.adapters.problems import shown_name
from vllm_multilora.integration.server.names.model_names import takes_any_name
from vllm_multilora.integration.server.names.public_names import public_names
from vllm_multilora.integration.server.names.routes import ROUTES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_UPDATE = "session.update"
_VIOLATION = 1008  # of the server's policy, by RFC 6455


def only_base_model(app: ASGIApp, models: Any) -> ASGIApp:
    """An application whose WebSockets are closed when their client names another model.

    vLLM answers such an event with an error, and goes on with the base model if the client has
    named that before.

    Args:
        app: Serves the WebSockets.
        models: vLLM's table of models.
    """

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        is_closed = False

        async def receive_checked() -> Message:
            nonlocal is_closed
            message = await receive()
            if message["type"] != "websocket.receive":
                return message
            fault = _fault(models, _model_in(message))
            if fault is None:
                return message
            is_closed = True
            event = json.dumps({"type": "error", "error": fault, "code": "model_not_found"})
            await send({"type": "websocket.send", "text": event})
            await send({"type": "websocket.close", "code": _VIOLATION, "reason": "model"})
            return {"type": "websocket.disconnect", "code": _VIOLATION}

        async def send_open(message: Message) -> None:
            if not is_closed:
                await send(message)

        await app(scope, receive_checked, send_open)

    return serve


def _model_in(message: Message) -> Any:
    """The model that an event sets; None where it sets none."""
    try:
        event = json.loads(message.get("text") or message.get("bytes") or "")
    except (ValueError, RecursionError):
        return None
    is_update = isinstance(event, dict) and event.get("type") == _UPDATE
    return event.get("model") if is_update else None


def _fault(models: Any, model: Any) -> str | None:
    """Why a session may not set a model; None where it may, or names none."""
    if model is None or model == "" or models.is_base_model(model):
        return None
    names = (public_names(models), ROUTES.get(models) or ())
    if isinstance(model, str) and any(model in each for each in names):
        base = models.base_model_paths[0].name
        return f"/v1/realtime serves no adapters: found the model `{model}`, expected `{base}`."
    if takes_any_name():
        return None
    return f"The model `{shown_name(str(model))}` does not exist."
