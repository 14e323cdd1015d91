"""Requests that ask for a reload of their adapter while another one is under way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_multilora.integration.engine.requests.tenant_wall import tenant_of
from vllm_multilora.integration.failed_requests import to_stop_reason

if TYPE_CHECKING:
    from vllm.v1.request import Request

HAS_RUN = (RequestStatus.RUNNING, RequestStatus.PREEMPTED)


class LateReloads:
    """Holds requests for reloads back while one is on its way, and all that then come after them.

    It is on its way until the requests for it have begun to run. While the store is at it, it may
    have opened the files before these were written again; and later one reload more would take from
    those requests the version that they wait to run with. So one is asked for, for all that are
    held back, as soon as those before them have begun, however many reloads are asked for.
    """

    def __init__(self) -> None:
        # Requests that are held back, by adapter, for all adapters of which a reload is on its way.
        self._held: dict[int, dict[str, None]] = {}

    def hold(self, request: Request, adapters: Any) -> bool:
        """Whether a new request with an adapter is held back; `adapters` are `EngineAdapters`."""
        lora = request.lora_request
        assert lora is not None
        number = lora.lora_int_id
        held = self._held.get(number)
        if not (held or lora.load_inplace):
            return False
        if held is None:
            held = self._held[number] = {}
            if not adapters.is_reloading(number):
                return False
        held[request.request_id] = None
        return True

    def holds(self, request: Request) -> bool:
        """Whether a request with an adapter is held back now."""
        lora = request.lora_request
        return lora is not None and request.request_id in self._held.get(lora.lora_int_id, ())

    def ask(self, requests: Mapping[str, Request], adapters: Any) -> dict[str, str]:
        """Asks for the reloads whose turn it is, and ends what waits for one that has failed.

        No step may look at such a request for long: others of its adapter, which the version before
        serves, wait for a slot before it.

        Returns:
            Of requests that cannot be served, why, as stop reasons.
        """
        failing: dict[str, str] = {}
        if not self._held:
            return failing
        awaited = set[int]()
        for request in requests.values():
            lora = request.lora_request
            if lora is None or has_begun(request) or self.holds(request):
                continue
            awaited.add(lora.lora_int_id)
            failure = adapters.failure(lora.lora_int_id, reload=True) if lora.load_inplace else None
            if failure is not None:
                failing[request.request_id] = to_stop_reason(failure, lora)
        for number in [n for n in self._held if n not in awaited and not adapters.is_reloading(n)]:
            held = self._held.pop(number)
            if held:
                self._held[number] = {}  # until these have begun
            for request in filter(None, map(requests.get, held)):
                lora = request.lora_request
                assert lora is not None
                if (failure := adapters.request_load(lora, tenant_of(request))) is not None:
                    failing[request.request_id] = to_stop_reason(failure, lora)
        return failing


def has_begun(request: Request) -> bool:
    """Whether a request has its adapter, or had it; one that has ended waits for none either."""
    return bool(request.status in HAS_RUN or request.num_computed_tokens or request.is_finished())
