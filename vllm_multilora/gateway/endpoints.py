"""What each path is for, whoever asks."""

from __future__ import annotations

import re
from collections.abc import Collection

from vllm_multilora.gateway.table import TENANT_ROUTES, Route
from vllm_multilora.tenants.rules import STATUS, STATUS_PAGE, Endpoint
from vllm_multilora.tenants.tenant import STORED_RESPONSES

_HEALTH = ("/health", "/ping")
_MANAGE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_SAGEMAKER_ADAPTERS = "/adapters"
_MODELS = "/v1/models"
_CANCEL = "/cancel"
_STORED_RESPONSE = re.compile(rf"/v1/responses/[^/]+({_CANCEL})?")


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
    if path == STATUS:
        return Endpoint.STATUS
    if path == _MODELS and method in ("GET", "HEAD"):
        return Endpoint.MODELS
    if method == "POST" and path in TENANT_ROUTES:
        return Endpoint.CALL
    if _STORED_RESPONSE.fullmatch(path):
        is_read = method == "GET" and not path.endswith(_CANCEL)
        is_cancelled = method == "POST" and path.endswith(_CANCEL)
        return Endpoint.STORED if is_read or is_cancelled else Endpoint.OTHER
    return Endpoint.OTHER


def called_route(path: str) -> Route:
    """What the table says of the path of a tenant's call."""
    return TENANT_ROUTES[path.rstrip("/")]


def refused_word(endpoint: Endpoint, path: str, allow: Collection[str]) -> str | None:
    """The word that a tenant lacks for a path that tenants may call; None where it lacks none."""
    word = STORED_RESPONSES if endpoint is Endpoint.STORED else None
    if endpoint is Endpoint.CALL:
        word = called_route(path).word
    return None if word is None or word in allow else word
