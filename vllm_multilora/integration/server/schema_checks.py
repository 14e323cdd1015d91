"""Checks tenants' structured outputs on threads, where vLLM has its event loop wait for them.

A schema of a line, with long repetitions in a pattern, takes seconds, and nobody is answered
meanwhile. So a tenant's is checked before vLLM looks at its request, in the tenant's turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.server.callers import current_caller, current_tenant
from vllm_multilora.integration.server.registration import to_its_end
from vllm_multilora.integration.server.request_bounds import require_short

CHECKED: Attached[bool] = Attached("checked")
"""Set for a request's `StructuredOutputsParams` that were checked before vLLM would check them."""

# Not asyncio's own, with which vLLM looks up hosts: there may be a slow schema for each tenant.
_THREADS = ThreadPoolExecutor(thread_name_prefix="multilora-schemas")


async def add_request(
    original: Callable[..., Any],
    client: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Looks at a tenant's parameters before vLLM does, where that may take long.

    Raises:
        GracefulHTTPError: There is too much of something.
        ValueError: As vLLM's, where a structured output cannot be had.
    """
    caller = current_caller.get()
    if caller is not None and caller.account is not None:
        require_short(params)
        if (wanted := getattr(params, "structured_outputs", None)) is not None:
            by = client.input_processor
            given = by.model_config, by.structured_outputs_config, by.tokenizer
            async with caller.account.checking:
                # Those to several prompts of a call are one. The thread goes on if the client goes.
                if not CHECKED.is_set(wanted):
                    await to_its_end(_check(params._validate_structured_outputs, *given))
                    CHECKED.set(wanted, True)
    return await original(client, request_id, prompt, params, *args, **kwargs)


async def _check(check: Callable[..., None], *given: Any) -> None:
    await asyncio.get_running_loop().run_in_executor(_THREADS, check, *given)


def check_structured_outputs(original: Callable[..., None], params: Any, *given: Any) -> None:
    """Checks whether a structured output can be had, unless that has been checked."""
    if not CHECKED.is_set(params.structured_outputs):
        original(params, *given)


def validate_structural_tag(
    original: Callable[..., None], payload: Any, *args: Any, **kwargs: Any
) -> None:
    """Checks a structural tag as an endpoint reads it; a tenant's is checked with its schemas."""
    if current_tenant() is None:
        original(payload, *args, **kwargs)
