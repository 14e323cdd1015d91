"""Errors of refused calls, which would hold all that was in memory for them.

An error holds the variables of the functions that it has passed, and some of vLLM's have a variable
that holds the error: its task, or the results of which it is one. Python finds such a circle when
it looks for circles, which may take it gigabytes of images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


async def release(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Awaits vLLM's original, whose variables are gone where it fails."""
    try:
        return await original(*args, **kwargs)
    except BaseException as error:
        inner = error.__traceback__ and error.__traceback__.tb_next
        if inner:
            inner.tb_frame.clear()
        raise


def with_cancellation(original: Callable[..., Any], endpoint: Callable[..., Any]) -> Any:
    """An endpoint whose work ends where its client goes, as vLLM makes one."""
    cancelled = original(endpoint)

    @functools.wraps(endpoint)
    async def call(*args: Any, **kwargs: Any) -> Any:
        return await release(cancelled, *args, **kwargs)

    return call
