"""Wakes a thread that waits elsewhere when the store sends something."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

_WITHOUT_STORE_S = 0.1


class Waker:
    """A daemon thread that watches a descriptor.

    Args:
        wake: Called when something has come, or when it is time to look for the store again; then
            not before the next `rearm`.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._watched = -1
        self._armed = True
        self._closed = False
        self._bell, self._rope = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="multilora-waker", daemon=True)
        self._thread.start()

    def watch(self, descriptor: int) -> None:
        """Watches another descriptor from now on; -1: none, there is no store."""
        self._watched = descriptor
        self._ring()

    def rearm(self) -> None:
        """What had come has been taken."""
        if not self._armed:
            self._armed = True
            self._ring()

    def close(self) -> None:
        self._closed = True
        self._ring()
        self._thread.join()
        os.close(self._bell)
        os.close(self._rope)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._rope, b"\0")

    def _run(self) -> None:
        while not self._closed:
            watched, armed = self._watched, self._armed
            poller = select.poll()
            poller.register(self._bell, select.POLLIN)
            if armed and watched >= 0:
                poller.register(watched, select.POLLIN)
            without_store = armed and watched < 0
            events = poller.poll(_WITHOUT_STORE_S * 1000 if without_store else None)
            rung = any(descriptor == self._bell for descriptor, _ in events)
            if rung:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._bell, 4096)
            if len(events) > rung or (without_store and not rung):
                self._armed = False
                self._wake()
