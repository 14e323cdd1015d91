"""Requests that ask for a reload of their adapter while another one is under way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from vllm_multilora.integration.failures import to_stop_reason
from vllm_multilora.integration.tenant_of_request import tenant_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_multilora.integration.engine.adapters import EngineAdapters

_HAS_RUN = (RequestStatus.RUNNING, RequestStatus.PREEMPTED)


class LateReloads:
    """Holds such requests back, and all that come after them for the same adapter.

    What is under way may have opened the files before these were written again. One reload more is
    asked for all that are held back, as soon as those before them have begun to run: these are not
    to wait for it, however many reloads are asked for.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[str]] = {}  # requests by adapter

    def __bool__(self) -> bool:
        return bool(self._held)

    def hold(self, request: Request, adapters: EngineAdapters) -> bool:
        """Whether a new request with an adapter is held back."""
        lora = request.lora_request
        assert lora is not None
        number = lora.lora_int_id
        is_late = lora.load_inplace and adapters.is_reloading(number)
        if number not in self._held and not is_late:
            return False
        self._held.setdefault(number, []).append(request.request_id)
        return True

    def holds(self, request: Request) -> bool:
        """Whether a request with an adapter is held back now."""
        lora = request.lora_request
        return lora is not None and request.request_id in self._held.get(lora.lora_int_id, ())

    def ask(self, requests: Mapping[str, Request], adapters: EngineAdapters) -> dict[str, str]:
        """Asks for the reloads whose turn it is.

        Args:
            requests: All that have not ended.
            adapters: Are asked.

        Returns:
            Of requests that cannot be served, why, as stop reasons.
        """
        failing = {}
        for number, held in list(self._held.items()):
            if adapters.is_reloading(number) or _some_wait(number, held, requests):
                continue
            del self._held[number]
            for request in filter(None, map(requests.get, held)):
                lora = request.lora_request
                assert lora is not None
                if (failure := adapters.want(lora, tenant_of(request))) is not None:
                    failing[request.request_id] = to_stop_reason(failure, lora)
        return failing


def _some_wait(number: int, held: list[str], requests: Mapping[str, Request]) -> bool:
    """Whether a request for an adapter that is not held back has still to begin."""
    return any(
        request.lora_request is not None
        and request.lora_request.lora_int_id == number
        and not (request.status in _HAS_RUN or request.num_computed_tokens or request.is_finished())
        and request.request_id not in held
        for request in requests.values()
    )
