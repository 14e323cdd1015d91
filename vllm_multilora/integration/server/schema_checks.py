"""Checks tenants' structured outputs on threads, where vLLM has its event loop wait for them.

A schema of a line, with long repetitions in a pattern, takes seconds, and nobody is answered
meanwhile. So a tenant's is checked when its request is about to be sent, in the tenant's turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm_multilora.integration.server.callers import current_caller
from vllm_multilora.integration.server.registration import to_its_end

_postponed: ContextVar[Callable[[Any], None] | None] = ContextVar("multilora_check", default=None)
"""Checks the structured output of the request that is about to be sent."""

_checked: ContextVar[Any] = ContextVar("multilora_checked", default=None)
"""The structured output that was checked last; the children of a request have one in common."""


def check_structured_outputs(original: Callable[..., None], params: Any, *given: Any) -> None:
    """Checks whether a structured output can be had; a tenant's when its request is to be sent.

    vLLM does so on the event loop: a schema of a line, with long repetitions in a pattern, takes
    seconds, and nobody is answered meanwhile.
    """
    caller = current_caller.get()
    if caller is None or caller.account is None or params.structured_outputs is None:
        original(params, *given)
        return

    def check(params: Any) -> None:
        original(params, *given)

    _postponed.set(check)


async def check_postponed(params: Any) -> None:
    """Checks the structured output of the call's request that is about to be sent.

    Raises:
        ValueError: As vLLM's, where it cannot be had.
    """
    caller, check = current_caller.get(), _postponed.get()
    wanted = getattr(params, "structured_outputs", None)
    if caller is None or caller.account is None or check is None or wanted is None:
        return
    if _checked.get() is not wanted:
        async with caller.account.checking:  # the thread goes on, whether the client goes or not
            await to_its_end(asyncio.to_thread(check, params))
        _checked.set(wanted)
