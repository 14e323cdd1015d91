"""Who may call which endpoint, by the keys that a server has."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from http import HTTPStatus


class Role(enum.Enum):
    """Who sent a request."""

    OPERATOR = "operator"
    """Has the admin key; where there is none, vLLM's API key."""
    CLIENT = "client"
    """Has vLLM's API key, where there is an admin key."""
    TENANT = "tenant"
    """Has a tenant's key."""
    STRANGER = "stranger"
    """Has no key that the server knows."""


class Endpoint(enum.Enum):
    """What a path is for."""

    HEALTH = "health"
    PAGE = "page"
    """Is a static page, the same for everybody; what it shows it asks other endpoints for."""
    MANAGE = "manage"
    """Loads and unloads adapters."""
    STATUS = "status"
    """Tells what all adapters are doing."""
    MODELS = "models"
    """Lists what may be asked for."""
    CALL = "call"
    """Names a model and asks it something."""
    STORED = "stored"
    """Reads or cancels a response that a call has left."""
    OTHER = "other"


@dataclass(frozen=True)
class Locks:
    """Which keys a server has.

    Attributes:
        api_key: vLLM's.
        admin_key: The operator's own.
        tenants: Those of a tenants file.
    """

    api_key: bool
    admin_key: bool
    tenants: bool

    @property
    def any(self) -> bool:
        """Whether there is anything to guard with."""
        return self.api_key or self.admin_key or self.tenants

    def shows_folders(self, role: Role) -> bool:
        """Whether answers may name folders of the server's machine."""
        return role is Role.OPERATOR or not (self.admin_key or self.tenants)


STATUS = "/v1/lora_adapters"
"""Where a server tells what all adapters are doing."""

STATUS_PAGE = "/multilora"
"""Where the page is that shows it."""

OF_TENANTS = (Endpoint.STATUS, Endpoint.MODELS, Endpoint.CALL, Endpoint.STORED)
"""What tenants may ask, beside what anybody may."""

INVOCATIONS = "/invocations"
"""Where a request of any kind may be sent: vLLM tries it as one after the other."""

_HEALTH = ("/health", "/ping")
_MANAGE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_SAGEMAKER_ADAPTERS = "/adapters"
_MODELS = "/v1/models"
_CALLS = frozenset(
    {
        INVOCATIONS,
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/render",
        "/v1/chat/completions/derender",
        "/v1/completions",
        "/v1/completions/render",
        "/v1/completions/derender",
        "/v1/responses",
        "/v1/responses/render",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/messages/render",
        "/v1/embeddings",
        "/v2/embed",
        "/v1/score",
        "/score",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/classify",
        "/pooling",
        "/tokenize",
        "/detokenize",
        "/generative_scoring",
        "/v1/systemone",
        "/v1/decisions",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/inference/v1/generate",
        "/cohere/v2/chat",
        "/cohere/v2/chat/render",
    }
)
_STORED_RESPONSES = "/v1/responses/"


def endpoint_of(method: str, path: str) -> Endpoint:
    """What a request's method and path are for.

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
    if path in _CALLS:
        return Endpoint.CALL
    if path.startswith(_STORED_RESPONSES):
        is_known = method == "GET" or (method == "POST" and path.endswith("/cancel"))
        return Endpoint.STORED if is_known else Endpoint.CALL
    return Endpoint.OTHER


def refusal(locks: Locks, role: Role, endpoint: Endpoint, path: str) -> HTTPStatus | None:
    """Why a request is not answered: 401 without a key, 403 with a key of too few rights.

    Args:
        locks: Which keys the server has; at least one.
        role: Who sent it.
        endpoint: What it is for.
        path: Decoded, without the server's root path.

    Returns:
        None where it is answered, or left to vLLM's own check of its API key.
    """
    if endpoint in (Endpoint.HEALTH, Endpoint.PAGE) or role is Role.OPERATOR:
        return None
    if role is Role.TENANT:
        return None if endpoint in OF_TENANTS else HTTPStatus.FORBIDDEN
    if role is Role.CLIENT:
        return HTTPStatus.FORBIDDEN if endpoint is Endpoint.MANAGE else None
    is_guarded = endpoint in (Endpoint.MANAGE, Endpoint.STATUS) or (
        locks.api_key and path.rstrip("/") == INVOCATIONS
    )
    return HTTPStatus.UNAUTHORIZED if locks.tenants or is_guarded else None
