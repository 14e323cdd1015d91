"""Which tenant a request belongs to, in the engine core.

A request's seal says it; see `integration.seals`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_multilora.integration.attached import Attached

TENANT: Attached[RequestTenant] = Attached("tenant")
"""The tenant of an engine core's `Request`; see `tenant_of`."""


class RequestTenant(NamedTuple):
    """The tenant of a request, as far as the engine core and the store have to know.

    Attributes:
        name: The tenant's name.
        weight: Its share of what tenants compete for, relative to others'; above 0.
        resident: Most of its adapters that stay in host memory; None is no limit.
    """

    name: str
    weight: float = 1.0
    resident: int | None = None


def tenant_of(request: Any) -> RequestTenant | None:
    """The tenant of vLLM's `Request` in an engine core; None where it is no tenant's."""
    return TENANT.get(request)
