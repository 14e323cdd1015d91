"""How an engine core tells API servers which version of an adapter a request runs on.

The version is sent with the request's first output, in one of vLLM's fields that is passed on
unread: an engine's outputs have no field for plugins. If a request goes on with another version,
that is sent with the first output that has a token of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.v1.request import Request

KEY = "x-multilora-version"
"""Under which an output tells the version."""

PARTS = "x-multilora-parts"
"""Under which it tells what each version since the last such output computes."""


class VersionPart(NamedTuple):
    """A version, from some token of a request on.

    Attributes:
        digest: Its weights' digest.
        update: How many versions of the adapter came before it.
        computed: Tokens of the prompt that earlier versions have computed.
    """

    digest: str
    update: int
    computed: int


class Announcements:
    """The requests whose version is still to be told; for the engine core's main thread."""

    def __init__(self) -> None:
        self._untold: list[tuple[Request, int]] = []  # with their output tokens until then

    def announce(
        self, request: Request, digest: str, update: int | None = None, computed: int | None = None
    ) -> None:
        """A request begins to run, or goes on, with a version of its adapter.

        Args:
            request: It is told with its next output.
            digest: The version's.
            update: How many versions came before; None where requests end on their first one.
            computed: Tokens that versions before have computed; None: those that were answered.
        """
        headers = {**(request.trace_headers or {})}
        if KEY not in headers:
            self._untold.append((request, request.num_output_tokens))
        headers[KEY] = digest
        if update is not None:
            if computed is None:
                computed = request.num_prompt_tokens if request.num_output_tokens else 0
            part = f"{digest}:{update}:{computed}"
            headers[PARTS] = f"{headers[PARTS]},{part}" if PARTS in headers else part
        request.trace_headers = headers

    def step(self) -> None:
        """A step's outputs have been made: what has had one is told."""
        if self._untold:
            self._untold = [each for each in self._untold if not _reported(*each)]


def _reported(request: Request, tokens: int) -> bool:
    if not (request.num_output_tokens > tokens or request.is_finished()):
        return False
    headers = {k: v for k, v in (request.trace_headers or {}).items() if k not in (KEY, PARTS)}
    request.trace_headers = headers or None
    return True


def version_in(headers: Mapping[str, str] | None) -> str | None:
    """The digest that an output tells; None if it tells none."""
    return None if headers is None else headers.get(KEY)


def parts_in(headers: Mapping[str, str] | None) -> list[VersionPart]:
    """What an output tells of versions that one request has had, in their order."""
    told = (headers or {}).get(PARTS, "")
    parts = (part.split(":") for part in told.split(",") if part)
    return [VersionPart(digest, int(update), int(done)) for digest, update, done in parts]
