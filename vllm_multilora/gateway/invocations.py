"""SageMaker's `/invocations`: the model that the body names is the one that answers.

SageMaker's own code replaces the body's `model` by what its header says, and by nothing where there
is no header. The base model would then answer for an adapter. So the header always names the model
here: the one that the client's header names or, where that is empty, the body's.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING

from vllm_multilora.gateway.paths import route_path
from vllm_multilora.gateway.refused_answers import error_answer
from vllm_multilora.tenants.rules import INVOCATIONS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ADAPTER_HEADER = b"x-amzn-sagemaker-adapter-identifier"


class InvocationsMiddleware:
    """Sets SageMaker's header of requests to `/invocations`.

    Args:
        app: Answers the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_invocation = scope["type"] == "http" and route_path(scope).rstrip("/") == INVOCATIONS
        if not is_invocation or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        named = [
            value.decode("latin-1") for key, value in scope["headers"] if key == ADAPTER_HEADER
        ]
        model = next((value for value in named if value.strip()), None)
        if model is None:
            body, receive = await _read(receive)
            try:
                model = _model_in(body)
            except ValueError as error:
                answer = error_answer(
                    HTTPStatus.BAD_REQUEST, str(error), path=INVOCATIONS, param="model"
                )
                await answer(scope, receive, send)
                return
        headers = [pair for pair in scope["headers"] if pair[0] != ADAPTER_HEADER]
        if model is not None:
            headers.append((ADAPTER_HEADER, model.encode("latin-1")))
        await self._app({**scope, "headers": headers}, receive, send)


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """A request's whole body, and what gives it once more."""
    messages: list[Message] = []
    while not messages or messages[-1].get("more_body", False):
        messages.append(await receive())
    body = b"".join(message.get("body", b"") for message in messages)

    async def receive_again() -> Message:
        return messages.pop(0) if messages else await receive()

    return body, receive_again


def _model_in(body: bytes) -> str | None:
    """The model that a body names; None where it names none, or is not JSON that could.

    Raises:
        ValueError: It names one that the header cannot carry on.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # the endpoint refuses it
        return None
    model = content.get("model") if isinstance(content, dict) else None
    if model is None:
        return None
    if not isinstance(model, str):
        raise ValueError(f"model: found {type(model).__name__}, expected a string.")
    try:
        model.encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(
            "model: found characters that SageMaker's header cannot carry, expected Latin-1; other "
            "paths take such names."
        ) from None
    return model
