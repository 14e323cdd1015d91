"""Which tenant a request belongs to: written by the API server, read by all later code.

On the wire the tenant travels beside the trace headers (`tenants.on_request`). The engine core
takes it out of them when the request arrives, since vLLM sends trace headers back with the output
of every step.
"""

from __future__ import annotations

from typing import Any

from vllm_multilora.integration.attached import TENANT
from vllm_multilora.tenants.on_request import (
    RequestTenant,
    tenant_in,
    with_tenant,
    without_tenant,
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
