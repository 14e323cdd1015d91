"""Tells of loads that are over: one at a time, in order, and not of those taken back."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from vllm_multilora.cache.load_queue import LoadReport

logger = logging.getLogger(__name__)

R = TypeVar("R")


class LoadReports(Generic[R]):
    """Reports on their way to a callback.

    The callback runs on the thread that calls `deliver`, without the lock. While one thread is
    at it others leave theirs to it, which keeps the order.

    Args:
        changed: The owner's lock, notified of every change.
        on_done: The callback.
    """

    def __init__(self, changed: threading.Condition, on_done: Callable[[int, LoadReport[R]], None]):
        self._on_done = on_done
        # Guards all of the below.
        self._changed = changed
        self._waiting: deque[tuple[int, LoadReport[R]]] = deque()
        self._reporter: int | None = None  # The thread that delivers ...
        self._reported: int | None = None  # ... and the adapter that it tells of now.

    def add(self, adapter_id: int, report: LoadReport[R] | None) -> None:
        """Appends a report, if there is one; called with the lock held."""
        if report is not None:
            self._waiting.append((adapter_id, report))

    def retract(self, adapter_id: int) -> None:
        """Makes sure that no call of the callback for the adapter begins or goes on from now.

        Called with the lock held, which it gives up while another thread is in that call.
        """
        self._waiting = deque(entry for entry in self._waiting if entry[0] != adapter_id)
        while self._reported == adapter_id and self._reporter != threading.get_ident():
            self._changed.wait()

    def clear(self) -> None:
        """Takes back all reports; called with the lock held."""
        self._waiting.clear()

    def deliver(self) -> None:
        """Calls the callback for all that waits, unless another thread is at it and will.

        An exception of the callback is logged. One that is none of `Exception` passes: on the main
        thread it may be a signal's, and none of the callback's doing.
        """
        with self._changed:
            if self._reporter is not None:
                return
            self._reporter = threading.get_ident()
        try:
            while (entry := self._next()) is not None:
                try:
                    self._on_done(*entry)
                except Exception:
                    logger.exception("Telling of the load of adapter %d failed", entry[0])
        except BaseException:
            with self._changed:
                self._reporter = self._reported = None
                self._changed.notify_all()
            raise

    def deliver_from_thread(self) -> None:
        """As `deliver`, on a thread that nothing the callback raises may end."""
        try:
            self.deliver()
        except BaseException:
            logger.exception("Telling of the load of an adapter ended in an exit")

    def _next(self) -> tuple[int, LoadReport[R]] | None:
        with self._changed:
            entry = self._waiting.popleft() if self._waiting else None
            self._reported = None if entry is None else entry[0]
            if entry is None:
                self._reporter = None
            self._changed.notify_all()
            return entry
