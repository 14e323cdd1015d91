"""What each path is for, whoever asks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vllm_multilora.gateway.table import TENANT_ROUTES, Route
from vllm_multilora.tenants.rules import STATUS, STATUS_PAGE, Endpoint

_HEALTH = ("/health", "/ping")
_MANAGE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_SAGEMAKER_ADAPTERS = "/adapters"
_MODELS = "/v1/models"


def endpoint_of(method: str, path: str) -> Endpoint:
    """Says what a request's method and path are for.

    Args:
        method: In capitals.
        path: Decoded, without the server's root path.
    """
    path = path.rstrip("/")
    if path in _HEALTH:
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


def called_route(path: str) -> Route:
    """What the table says of the path of a tenant's call."""
    return TENANT_ROUTES[path.rstrip("/")]


def refused_word(endpoint: Endpoint, path: str, allow: Collection[str]) -> str | None:
    """The word that a tenant lacks for a path that tenants may call; None where it lacks none."""
    word = called_route(path).word if endpoint is Endpoint.CALL else None
    return None if word is None or word in allow else word


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
