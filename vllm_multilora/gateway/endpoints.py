"""What each path is for, whoever asks, and the form that refusals have there.

That is the form of the API that was called: OpenAI's, Anthropic's or Cohere's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from vllm_multilora.gateway.table import TENANT_ROUTES
from vllm_multilora.integration.server.requests.callers import ANTHROPIC_TYPES, TYPES
from vllm_multilora.tenants.rules import STATUS, STATUS_PAGE, Endpoint

HEALTH = ("/health", "/ping")
_MANAGE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_SAGEMAKER_ADAPTERS = "/adapters"
_MODELS = "/v1/models"
ANTHROPIC_STATUSES = {kind: status for status, kind in reversed(ANTHROPIC_TYPES.items())}
"""Statuses of Anthropic's errors, which do not hold them."""

_COHERE = "/cohere/v2/chat"

RETRY_LATER = "2"
"""`Retry-After` of an answer with 503 that has none: seconds until a client may ask again."""

_HEADERS: dict[int, dict[str, str]] = {
    HTTPStatus.UNAUTHORIZED: {"www-authenticate": "Bearer"},
    HTTPStatus.SERVICE_UNAVAILABLE: {"retry-after": RETRY_LATER},
}


def endpoint_of(method: str, path: str) -> Endpoint:
    """Says what a method and a path, decoded and without the server's root path, are for."""
    path = path.rstrip("/")
    if path in HEALTH:
        return Endpoint.HEALTH
    if path == STATUS_PAGE and method == "GET":
        return Endpoint.PAGE
    if path in _MANAGE or path == _SAGEMAKER_ADAPTERS or path.startswith(_SAGEMAKER_ADAPTERS + "/"):
        return Endpoint.MANAGE
    if f"{path}/".startswith(f"{STATUS}/"):
        return Endpoint.STATUS
    if f"{path}/".startswith(f"{_MODELS}/") and method in ("GET", "HEAD"):
        return Endpoint.MODELS
    if method == "POST" and path in TENANT_ROUTES:
        return Endpoint.CALL
    return Endpoint.OTHER


def is_anthropics(path: str) -> bool:
    """Whether a path is in Anthropic's API, of which vLLM lacks some; vLLM's own one is not."""
    return f"{path}/".startswith("/v1/messages/") and path != "/v1/messages/render"


def header(pairs: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header, whose name is in lower case; None where there is none."""
    for each, value in pairs:
        if each == name:
            return value
    return None


def route_path(scope: Mapping[str, Any]) -> str:
    """The path by which Starlette finds a route: without the root path that a proxy has added."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if root and (path == root or path.startswith(f"{root}/")):
        return path[len(root) :]
    return path


def error_answer(
    status: HTTPStatus, message: str, *, path: str, param: str | None = None
) -> Response:
    """An error as clients of a path read it; OpenAI's are told the field that is at fault."""
    if is_anthropics(path):
        error = {"type": ANTHROPIC_TYPES[status], "message": message}
        return _json({"type": "error", "error": error}, status)
    if path == _COHERE:
        return _json({"message": message}, status)
    fields = {"message": message, "type": TYPES[status], "param": param, "code": status.value}
    return _json({"error": fields}, status)


def refusal_answer(refusal: Any, *, path: str) -> Response:
    """An `ErrorResponse` of vLLM's, or with an adapter's problems, as clients of a path read it."""
    error = refusal.error
    if is_anthropics(path) or path == _COHERE:
        return error_answer(HTTPStatus(error.code), error.message, path=path)
    return _json(refusal.model_dump(), error.code)


def _json(content: dict[str, Any], status: int) -> Response:
    """JSON in ASCII: what a client has sent, and an error repeats, may be no Unicode."""
    headers = _HEADERS.get(status)
    return Response(json.dumps(content), status, headers, media_type="application/json")
