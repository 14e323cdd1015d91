"""Refusals in the form of the API that was called: OpenAI's, Anthropic's or Cohere's."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from vllm_multilora.integration.server.requests.callers import TYPES

_ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
_COHERE = "/cohere/v2/chat"


def error_answer(
    status: HTTPStatus, message: str, *, path: str, param: str | None = None
) -> Response:
    """An error as clients of an endpoint read it.

    Args:
        status: The answer's status.
        message: Text for people.
        path: The endpoint's path, without the server's root path.
        param: The field of the body that is at fault, for OpenAI's clients.
    """
    kind = TYPES[status]
    content: dict[str, Any]
    if path in _ANTHROPIC:
        content = {"type": "error", "error": {"type": kind, "message": message}}
    elif path == _COHERE:
        content = {"message": message}
    else:
        error = {"message": message, "type": kind, "param": param, "code": status.value}
        content = {"error": error}
    return _json(content, status)


def refusal_answer(refusal: Any, *, path: str) -> Response:
    """An error of vLLM's as clients of an endpoint read it.

    Args:
        refusal: vLLM's `ErrorResponse`, or one with an adapter's problems.
        path: As for `error_answer`.
    """
    error = refusal.error
    if path in _ANTHROPIC or path == _COHERE:
        return error_answer(HTTPStatus(error.code), error.message, path=path)
    return _json(refusal.model_dump(), error.code)


def _json(content: dict[str, Any], status: int) -> Response:
    """JSON in ASCII: what a client has sent, and an error repeats, may be no Unicode."""
    return Response(json.dumps(content), status, media_type="application/json")
