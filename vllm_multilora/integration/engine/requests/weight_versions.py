"""How an engine core tells API servers which version of an adapter a request runs on.

The version is sent with the request's first output, in one of vLLM's fields that is passed on
unread: an engine's outputs have no field for plugins. If a request goes on with another version (a
swap in flight), that is sent with the first output that has a token of it. Steps that were
scheduled before the swap may still be computed after it, with the version before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm_multilora.integration.engine.requests import prefix_keys

if TYPE_CHECKING:
    from vllm.v1.request import Request

KEY, PARTS = "x-multilora-version", "x-multilora-parts"
"""Under which an output tells the version, and which versions have computed which part."""


Part = tuple[str, int, int]
"""A version's digest, the number of versions before it, and of the tokens that these computed."""


class Announcements:
    """The requests whose version is still to be told; for the engine core's main thread."""

    def __init__(self) -> None:
        self._untold: list[tuple[Request, int]] = []  # with their output tokens until then
        self._swaps: list[Callable[[], None]] = []  # of the step that is scheduled next
        self._steps: list[tuple[Any, Callable[[], None]]] = []  # by the scheduler's outputs

    def announce(self, request: Request, *part: Any) -> None:
        """A request's next output is a version's: a `Part`, or its digest if it has no other."""
        headers = {**(request.trace_headers or {})}
        if KEY not in headers:
            self._untold.append((request, request.num_output_tokens))
        headers[KEY] = part[0]
        if len(part) > 1:
            headers[PARTS] = f"{headers.get(PARTS, '')} {':'.join(map(str, part))}"
        request.trace_headers = headers

    def swap(self, versions: Mapping[int, tuple[str, int]], requests: Iterable[Request]) -> None:
        """Has running requests go on with these versions from the next step on.

        Each has its adapter's number, its digest, and the number of versions before it.
        """
        for request in requests if versions else ():
            lora, computed = request.lora_request, request.num_computed_tokens
            version = None if lora is None else versions.get(lora.lora_int_id)
            if version is not None and computed > 0:  # others begin with it
                prefix_keys.go_on(request, version[0])
                self._swaps.append(partial(self._swapped, request, *version, computed))

    def _swapped(self, request: Request, *part: Any) -> None:
        if not request.is_finished():
            prefix_keys.VERSION.set(request, part[0])
            self.announce(request, *part)

    def scheduled(self, output: Any) -> None:
        """A step has been scheduled."""
        self._steps += ((output, announce) for announce in self._swaps)
        self._swaps.clear()

    def computed(self, output: Any) -> None:
        """The outputs of a step are about to be made."""
        while any(each is output for each, _ in self._steps):
            self._steps.pop(0)[1]()

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


def parts_in(headers: Mapping[str, str] | None) -> list[Part]:
    """What an output tells of versions that one request has had, in their order."""
    parts = (part.split(":") for part in (headers or {}).get(PARTS, "").split())
    return [(digest, int(update), int(computed)) for digest, update, computed in parts]
