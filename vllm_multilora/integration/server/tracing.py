"""Attributes on vLLM's request spans: which adapter answered, which version, for whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_multilora.integration.server.http_calls import SHOWN_DIGITS
from vllm_multilora.integration.server.metering import ENDED

if TYPE_CHECKING:
    from vllm_multilora.metering.usage import Usage

PREFIX = "multilora."

_of_span: ContextVar[Mapping[str, str] | None] = ContextVar("multilora_span", default=None)


def attributes_of(usage: Usage) -> dict[str, str]:
    """What a request's span says of it; nothing that is not known."""
    version = None if usage.version is None else usage.version[:SHOWN_DIGITS]
    found = {
        "adapter": usage.adapter,
        "version": version,
        "route": usage.route,
        "tenant": usage.tenant,
    }
    return {f"{PREFIX}{name}": value for name, value in found.items() if value is not None}


# What vLLM calls


def do_tracing(
    original: Callable[..., None],
    processor: Any,
    output: Any,
    state: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    usage = ENDED.get(state)
    token = _of_span.set(None if usage is None else attributes_of(usage))
    try:
        original(processor, output, state, *args, **kwargs)
    finally:
        _of_span.reset(token)


def instrument_manual(
    original: Callable[..., Any],
    span_name: str,
    start_time: int,
    end_time: int | None = None,
    attributes: dict[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if (own := _of_span.get()) is not None:
        attributes = {**(attributes or {}), **own}
    return original(span_name, start_time, end_time, attributes, *args, **kwargs)
