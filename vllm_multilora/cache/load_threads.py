"""The background loader's threads: how many serve, how many hang, and when to start another."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from vllm_multilora.cache.load_failures import FailureKind, LoadFailure
from vllm_multilora.cache.thread_placement import step_aside

logger = logging.getLogger(__name__)


class LoadThreads:
    """Keeps `threads` threads serving, where at most as many hang; fewer where more do.

    All methods but `join` are called with the owner's lock held. Threads are daemons: one that
    hangs in the storage must not keep the process from ending.

    Args:
        threads: Threads that serve when none hangs, and threads that may be replaced.
        work: Body of a thread that loads.
        keep_time: Body of the one thread that gives up loads which hang.

    Attributes:
        hanging: Threads whose load was given up and has not returned.
    """

    def __init__(self, threads: int, work: Callable[[], None], keep_time: Callable[[], None]):
        self._threads = threads
        self._work = work
        self._keep_time = keep_time
        self._serving = 0
        self.hanging = 0
        self._workers_started = 0
        self._has_timer = False
        self._known: set[threading.Thread] = set()

    def fill(self) -> LoadFailure | None:
        """Starts the threads that are missing; why nothing can load, if nothing can then."""
        limit = 2 * self._threads
        while self._serving < self._threads and self._serving + self.hanging < limit:
            try:
                if not self._has_timer:
                    self._start("timer", self._keep_time)
                    self._has_timer = True
                self._start(str(self._workers_started), self._work)
            except RuntimeError as error:
                logger.error("A thread for loading adapters cannot be started: %s", error)
                break
            self._workers_started += 1
            self._serving += 1
        if self._serving:
            return None
        if self.hanging == limit:
            return LoadFailure(
                FailureKind.TIMEOUT,
                f"the storage hangs: {self.hanging} loads were given up and none has returned, "
                "so no thread is left to load with",
            )
        return LoadFailure(FailureKind.INTERNAL, "no thread to load with could be started")

    def give_up(self, count: int) -> None:
        """So many threads that served hang from now."""
        self._serving -= count
        self.hanging += count

    def take_back(self) -> bool:
        """A thread that hung has returned; whether it serves again, or ends as one too many."""
        self.hanging -= 1
        serves = self._serving < self._threads
        self._serving += serves
        return serves

    def join(self, timeout_s: float) -> bool:
        """Waits for all threads to end but the calling one; whether they have.

        Called without the lock, which they need to end, and after the last `fill`.
        """
        deadline = time.monotonic() + timeout_s
        others = self._known - {threading.current_thread()}
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in others)

    def _start(self, name: str, run: Callable[[], None]) -> None:
        def run_aside() -> None:
            step_aside()
            run()

        thread = threading.Thread(target=run_aside, name=f"multilora-load-{name}", daemon=True)
        thread.start()
        self._known = {known for known in self._known if known.is_alive()} | {thread}
