"""Which tenant a request belongs to: written by the API server, read by all later code.

vLLM carries a request's trace headers to the engine core, for generating and pooling requests
alike, and fills them from two headers of tracing alone: no client can write what is put beside
them. The API server writes the tenant there, once it knows who sent the request. The engine core
takes it out when the request arrives, since vLLM sends trace headers back with the output of every
step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_multilora.integration.attached import Attached

TENANT: Attached[RequestTenant] = Attached("tenant")
"""The tenant of an engine core's `Request`; see `tenant_of`."""

TENANT_KEY = "multilora-tenant"
"""The tenant's name."""

WEIGHT_KEY = "multilora-weight"
"""The tenant's weight, relative to other tenants': a decimal number above 0."""

RESIDENT_KEY = "multilora-resident"
"""The tenant's limit of adapters in host memory: a whole number above 0; absent where none is."""


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


def with_tenant(headers: Mapping[str, str] | None, tenant: RequestTenant) -> dict[str, str]:
    """A request's trace headers, with its tenant.

    Args:
        headers: What the request has for tracing.
        tenant: Whose it is.
    """
    said = {TENANT_KEY: tenant.name, WEIGHT_KEY: repr(float(tenant.weight))}
    if tenant.resident is not None:
        said[RESIDENT_KEY] = str(tenant.resident)
    return {**(headers or {}), **said}


def without_tenant(headers: Mapping[str, str] | None) -> dict[str, str] | None:
    """What a request has for tracing alone; None where that is nothing."""
    rest = {
        key: value
        for key, value in (headers or {}).items()
        if key not in (TENANT_KEY, WEIGHT_KEY, RESIDENT_KEY)
    }
    return rest or None


def tenant_in(headers: Mapping[str, str] | None) -> RequestTenant | None:
    """The tenant; None where the request is no tenant's."""
    if headers is None or TENANT_KEY not in headers:
        return None
    resident = headers.get(RESIDENT_KEY)
    return RequestTenant(
        headers[TENANT_KEY],
        float(headers[WEIGHT_KEY]),
        None if resident is None else int(resident),
    )


def set_tenant(request: Any, tenant: RequestTenant) -> None:
    """In the API server: says whose a request is.

    Args:
        request: vLLM's `EngineCoreRequest`, not sent yet.
        tenant: Whose it is.
    """
    request.trace_headers = with_tenant(request.trace_headers, tenant)


def take_tenant(request: Any) -> None:
    """In the engine core: keeps the tenant with the request, outside of its trace headers.

    Args:
        request: vLLM's `Request`, as it has just arrived.
    """
    tenant = tenant_in(request.trace_headers)
    if tenant is not None:
        TENANT.set(request, tenant)
        request.trace_headers = without_tenant(request.trace_headers)


def tenant_of(request: Any) -> RequestTenant | None:
    """The tenant; None where the request is no tenant's.

    Args:
        request: vLLM's `Request` or `EngineCoreRequest`, in any process and at any time.
    """
    return TENANT.get(request) or tenant_in(request.trace_headers)
