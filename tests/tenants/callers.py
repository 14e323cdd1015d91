"""Requests of somebody's, without a server around them."""

from collections.abc import Callable
from typing import Any

from vllm_multilora.integration.server.requests.callers import Caller, current_caller


def as_caller(who: Caller | None, call: Callable[[], Any]) -> Any:
    """What a call returns that is made for somebody's request."""
    token = current_caller.set(who)
    try:
        return call()
    finally:
        current_caller.reset(token)
