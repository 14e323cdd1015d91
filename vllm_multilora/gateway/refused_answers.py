"""Refusals in the form of the API that was called: OpenAI's, Anthropic's or Cohere's."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from vllm_multilora.integration.server.requests.callers import TYPES

_ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
_ANTHROPIC_TYPES = {
    HTTPStatus.BAD_REQUEST: "invalid_request_error",
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.CONFLICT: "invalid_request_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.INTERNAL_SERVER_ERROR: "api_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}
_COHERE = "/cohere/v2/chat"

RETRY_LATER = "2"
"""`Retry-After` of an answer with 503 that has none: seconds until a client may ask again."""


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
    content: dict[str, Any]
    if path in _ANTHROPIC:
        error = {"type": _ANTHROPIC_TYPES[status], "message": message}
        content = {"type": "error", "error": error}
    elif path == _COHERE:
        content = {"message": message}
    else:
        kind = TYPES[status]
        content = {
            "error": {"message": message, "type": kind, "param": param, "code": status.value}
        }
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
    is_busy = status == HTTPStatus.SERVICE_UNAVAILABLE
    headers = {"retry-after": RETRY_LATER} if is_busy else None
    return Response(json.dumps(content), status, headers, media_type="application/json")
