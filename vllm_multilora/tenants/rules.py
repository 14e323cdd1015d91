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
    OTHER = "other"


@dataclass(frozen=True)
class Locks:
    """Which keys a server has: vLLM's, the operator's own, those of a tenants file."""

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

OF_TENANTS = (Endpoint.STATUS, Endpoint.MODELS, Endpoint.CALL)
"""What tenants may ask, beside what anybody may."""

INVOCATIONS = "/invocations"
"""Where a request of any kind may be sent: vLLM tries it as one after the other."""


def refusal(locks: Locks, role: Role, endpoint: Endpoint, path: str) -> HTTPStatus | None:
    """Why a request is not answered: 401 without a key, 403 with a key of too few rights.

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
