"""Counts, in a server's process, which adapters routes have led to."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vllm_multilora.metrics.definitions import ROUTE_REQUESTS
from vllm_multilora.metrics.recorder import Recorder

logger = logging.getLogger(__name__)


class RouteCounts:
    """The counts of one process; its file is made with the first.

    Attributes:
        make_recorder: Makes what records; None where metrics are off.
    """

    def __init__(self) -> None:
        self.make_recorder: Callable[[], Recorder | None] | None = None
        self._recorder: Recorder | None = None

    def start(self, make_recorder: Callable[[], Recorder | None]) -> None:
        """From now on there is somewhere to count to; the newest engine's place counts."""
        self.make_recorder, self._recorder = make_recorder, None

    def count(self, route: str, lora_name: str, reason: str) -> None:
        """Counts a request; see `count_route`."""
        if self._recorder is None:
            if self.make_recorder is None:
                return
            self._recorder, self.make_recorder = self.make_recorder(), None
            if self._recorder is None:
                return
        label = self._recorder.names.label(lora_name)
        self._recorder.series(ROUTE_REQUESTS, route, label, reason).inc()


COUNTS = RouteCounts()


def count_route(route: str, lora_name: str, reason: str = "") -> None:
    """Counts a request that a route has led to an adapter; does nothing where metrics are off.

    Args:
        route: The route's public name.
        lora_name: The adapter that it was led to; the served name of the base model if to that.
        reason: Why that one, out of few.
    """
    try:
        COUNTS.count(route, lora_name, reason)
    except Exception:  # a request must not fail for being counted
        logger.exception("A request of route %r could not be counted", route)
