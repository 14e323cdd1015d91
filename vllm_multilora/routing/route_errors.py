"""Exceptions for requests for a route."""

from __future__ import annotations

from vllm_multilora.errors import MultiLoRAError


class RequestError(MultiLoRAError):
    """A request for a route says nothing that the route can be led by."""


class NoCaseError(RequestError):
    """A request's value has no case in its route, and the route no default."""


class BadValueError(RequestError):
    """A request's value is longer than what it should name is called."""
