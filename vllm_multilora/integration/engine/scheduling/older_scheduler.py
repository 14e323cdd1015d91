"""Gives vLLM 0.29's and 0.30's scheduler the parts of 0.31's that ours extend.

From 0.31 on, vLLM asks `_handle_blocked_waiting_request` of every waiting request, and puts those
that cannot run back into the queue that they came from. Before, it asked only of requests with a
blocked status, by another name, and kept what it had skipped in a second queue, which it emptied
first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import proxy

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus


def with_newer_parts(scheduler: type) -> type:
    """A scheduler class with the parts of 0.31's: the class itself where it has them."""
    if hasattr(scheduler, "_handle_blocked_waiting_request"):
        return scheduler
    return type(scheduler)(scheduler.__name__, (_NewerParts, scheduler), {})


class _NewerParts:
    """Between our scheduler and vLLM's."""

    kv_holding_waiting: tuple[Request, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped_waiting = _PutBack(self)

    @property
    def max_num_active_reqs(self) -> int:
        """Maximum requests that may run at once."""
        return self.max_num_running_reqs  # type: ignore[attr-defined]

    def _is_blocked_waiting_status(self, status: RequestStatus) -> bool:
        return True  # so that vLLM asks of every request

    def _try_promote_blocked_waiting_request(self, request: Request) -> bool:
        return self._handle_blocked_waiting_request(request)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        if not super()._is_blocked_waiting_status(request.status):  # type: ignore[misc]
            return True
        return super()._try_promote_blocked_waiting_request(request)  # type: ignore[misc]


class _PutBack(RequestQueue):
    """In place of the queue of skipped requests: puts them back into the one of waiting requests.

    It always looks empty, so that vLLM takes requests from the other queue alone.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = proxy(
            scheduler
        )  # no circle: the scheduler goes when its engine core does

    def add_request(self, request: Request) -> None:
        self._scheduler.waiting.add_request(request)

    def prepend_request(self, request: Request) -> None:
        self._scheduler.waiting.prepend_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        self._scheduler.waiting.prepend_requests(requests)

    def remove_request(self, request: Request) -> None:
        pass  # vLLM removes it from both queues

    def remove_requests(self, requests: Iterable[Request]) -> None:
        pass  # vLLM removes them from both queues

    def peek_request(self) -> Request:
        raise IndexError("peek from an empty queue")

    def pop_request(self) -> Request:
        raise IndexError("pop from an empty queue")

    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Request]:
        return iter(self._scheduler.waiting)
