"""What an engine core records about requests by adapter: accepted, unfinished, kept waiting."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from vllm_multilora.metrics import definitions as defined
from vllm_multilora.metrics.recorder import Recorder


class RequestMetrics:
    """Follows requests from their arrival in the engine to their end; one thread."""

    def __init__(self, recorder: Recorder, clock: Callable[[], float] = time.monotonic) -> None:
        self._recorder = recorder
        self._clock = clock
        self._unfinished: Counter[int] = Counter()
        # Arrivals of requests whose adapter is not there yet.
        self._waiting: dict[int, dict[str, float]] = {}
        # Requests that are counted when it is known whether there is an adapter of their name.
        self._uncounted: dict[int, tuple[str, int]] = {}
        self._wait = recorder.histogram(defined.REQUEST_WAIT)
        self._requested = recorder.series(defined.REQUESTED)

    def accept(self, request_id: str, adapter_id: int, name: str, *, is_ready: bool) -> None:
        """A request was taken in; `is_ready`: its adapter is in host memory on every worker."""
        if is_ready:
            self._recorder.names.admit(name)
        if is_ready or self._recorder.names.has(name):
            self._count(name, 1)
        else:
            _, before = self._uncounted.get(adapter_id, (name, 0))
            self._uncounted[adapter_id] = name, before + 1
        self._unfinished[adapter_id] += 1
        self._requested.set(len(self._unfinished))
        if is_ready:
            self._wait.observe(0.0)
        else:
            self._waiting.setdefault(adapter_id, {})[request_id] = self._clock()

    def settled(self, adapter_id: int) -> None:
        """An adapter has arrived, or cannot be had: its requests have stopped waiting for it."""
        self._count_all(adapter_id)
        now = self._clock()
        for since in self._waiting.pop(adapter_id, {}).values():
            self._wait.observe(now - since)

    def finish(self, request_id: str, adapter_id: int) -> None:
        waiting = self._waiting.get(adapter_id)
        if waiting is not None and waiting.pop(request_id, None) is not None and not waiting:
            del self._waiting[adapter_id]
        self._unfinished[adapter_id] -= 1
        if self._unfinished[adapter_id] <= 0:
            del self._unfinished[adapter_id]
            self._count_all(adapter_id)
        self._requested.set(len(self._unfinished))

    def _count_all(self, adapter_id: int) -> None:
        if (uncounted := self._uncounted.pop(adapter_id, None)) is not None:
            self._count(*uncounted)

    def _count(self, name: str, requests: int) -> None:
        self._recorder.series(defined.REQUESTS, self._recorder.names.label(name)).inc(requests)
