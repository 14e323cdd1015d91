"""How an engine core tells API servers which version of an adapter a request runs on.

The version is sent once, with the request's first output, in one of vLLM's fields that is passed on
unread: an engine's outputs have no field for plugins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

KEY = "x-multilora-version"
"""Under which an output tells it."""


class Announcements:
    """The requests whose version is still to be told; for the engine core's main thread."""

    def __init__(self) -> None:
        self._untold: list[Request] = []

    def announce(self, request: Request, digest: str) -> None:
        """A request begins to run on a version of its adapter."""
        if version_in(request.trace_headers) is None:
            self._untold.append(request)
        request.trace_headers = {**(request.trace_headers or {}), KEY: digest}

    def step(self) -> None:
        """A step's outputs have been made: what has had one is told."""
        if self._untold:
            self._untold = [request for request in self._untold if not _reported(request)]


def _reported(request: Request) -> bool:
    if not (request.num_output_tokens or request.is_finished()):
        return False
    headers = {key: value for key, value in (request.trace_headers or {}).items() if key != KEY}
    request.trace_headers = headers or None
    return True


def version_in(headers: Mapping[str, str] | None) -> str | None:
    """The digest that an output tells; None if it tells none."""
    return None if headers is None else headers.get(KEY)
