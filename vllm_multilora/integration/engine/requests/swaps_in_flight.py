"""Requests that go on with other weights of their adapter, from some step on.

Steps that were scheduled before may not have been computed when the weights are swapped: their
tokens are those of the version before. So a request's new version is announced with the outputs of
the first step that was scheduled after the swap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_multilora.integration.engine.requests import prefix_keys
from vllm_multilora.integration.engine.requests.weight_versions import Announcements

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_multilora.integration.engine.adapters.adapter_machine import AdapterMachine


class SwapsInFlight:
    """Swaps whose first step has not been computed; for the engine core's main thread.

    Args:
        announcements: Are told of the requests' new versions.
    """

    def __init__(self, announcements: Announcements) -> None:
        self._announcements = announcements
        self._begun: list[Callable[[], None]] = []
        # By the output of the scheduler that began with them.
        self._scheduled: deque[tuple[Any, list[Callable[[], None]]]] = deque()

    def begin(self, adapter: AdapterMachine, requests: Iterable[Request]) -> None:
        """The next step's requests with an adapter use its newest version."""
        assert adapter.pack is not None
        digest, update = adapter.pack.digest, adapter.updates
        for request in requests:
            lora = request.lora_request
            if lora is None or lora.lora_int_id != adapter.number:
                continue
            if not request.num_computed_tokens:
                continue  # it gets its version when it begins to run
            prefix_keys.go_on(request, digest)
            computed = request.num_computed_tokens
            announce = partial(self._announce, request, digest, update, computed)
            if request.status is RequestStatus.RUNNING:
                self._begun.append(announce)
            else:
                announce()

    def scheduled(self, output: Any) -> None:
        """A step has been scheduled."""
        if self._begun:
            self._scheduled.append((output, self._begun))
            self._begun = []

    def computed(self, output: Any) -> None:
        """The outputs of a step are about to be made."""
        if not any(each is output for each, _ in self._scheduled):
            return
        is_last = False
        while not is_last:
            scheduled, begun = self._scheduled.popleft()
            is_last = scheduled is output
            for announce in begun:
                announce()

    def _announce(self, request: Request, digest: str, update: int, computed: int) -> None:
        if not request.is_finished():
            prefix_keys.VERSION.set(request, digest)
            self._announcements.announce(request, digest, update, computed)
