"""Loads adapters on background threads, while engine steps go on.

`LoadQueue` decides; the threads here only carry out. A load that hangs cannot be stopped, so its
thread is given up and another takes its place; at most `threads` replacements stand in for
hanging threads at a time, so that storage which hangs for good costs a bounded number of threads.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_multilora.cache.load_failures import (
    FailureKind,
    LoadDroppedError,
    LoaderClosedError,
    LoadFailedError,
    LoadFailure,
    classify_failure,
    describe_failure,
)
from vllm_multilora.cache.load_queue import Load, LoadQueue, LoadReport, LoadState
from vllm_multilora.cache.load_reports import LoadReports
from vllm_multilora.cache.load_threads import LoadThreads

logger = logging.getLogger(__name__)

R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class LoaderCounts:
    """What a loader is busy with.

    Attributes:
        queued: Adapters that wait for a thread or a place.
        loading: Loads under way and in time.
        staged: Adapters loaded and not taken.
        hanging: Loads that were given up and have not returned.
    """

    queued: int
    loading: int
    staged: int
    hanging: int


class BackgroundLoader(Generic[R, T]):
    """Loads adapters on threads and keeps each until it is taken.

    Every `want` is answered by one call of `on_done`, or by the one that answers a newer want of
    the same adapter: at the end of the load, or at once where the adapter is staged already or has
    failed a moment ago. Calls come one at a time, in the order in which things ended, from a
    loader's thread or one that calls `want`, and without a lock of the loader held. None begins
    after the adapter was dropped. `on_done` must be quick and must not wait for those who call
    the loader.

    All methods may be called from any thread, `on_done` included.

    Args:
        load: Loads what a request asks for; must not return None. Runs on a loader thread.
        threads: Most loads at a time, those not counted that hang and were given up.
        staged_limit: Most adapters that are loading or staged at a time; further wants wait. It
            bounds the memory of what is loaded and not yet in the cache.
        timeout_s: Seconds after which a load is given up and has failed.
        retry_delay_s: Seconds after a failure in which wants of the adapter fail alike, without
            a load.
        on_done: Told of every want that is over: the adapter and the report.
        classify: The kind of failure that an exception of `load` is.
        on_end: Told of every load that has ended or was given up, wanted or not: the request,
            what was loaded or why it was not, and seconds. It is called with the loader's lock
            held: it must be quick, must not raise and must not call the loader.
        clock: Seconds; only differences count.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        load: Callable[[R], T],
        *,
        threads: int,
        staged_limit: int,
        timeout_s: float,
        retry_delay_s: float,
        on_done: Callable[[int, LoadReport[R]], None],
        classify: Callable[[BaseException], FailureKind] = classify_failure,
        on_end: Callable[[R, T | LoadFailure, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        for name, count in (("threads", threads), ("staged_limit", staged_limit)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not 0 < timeout_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout_s must be a positive number of seconds, got {timeout_s}")
        if not 0 <= retry_delay_s < math.inf:
            raise ValueError(f"retry_delay_s must be zero or more seconds, got {retry_delay_s}")
        self._load = load
        self._classify = classify
        self._on_end = on_end
        self._clock = clock
        # Guards everything below, and is notified of every change of it. Held for bookkeeping
        # only: never while an adapter loads or `on_done` runs.
        self._changed = threading.Condition()
        self._queue: LoadQueue[R, T] = LoadQueue(
            staged_limit=staged_limit, timeout_s=timeout_s, retry_delay_s=retry_delay_s
        )
        self._reports: LoadReports[R] = LoadReports(self._changed, on_done)
        self._threads = LoadThreads(threads, self._work, self._keep_time)
        self._closed = False

    def want(self, adapter_id: int, request: R) -> LoadState:
        """Has an adapter loaded, unless it is staged or on its way; does not wait for it.

        Returns:
            QUEUED, LOADING, STAGED or FAILED. In the last two cases `on_done` has been called, or
            is about to be by another thread.

        Raises:
            LoaderClosedError: The loader is closed.
        """
        with self._changed:
            failure = self._failure_of(adapter_id)
            if failure is not None:
                state = LoadState.FAILED
                self._reports.add(adapter_id, LoadReport(request, failure))
            else:
                now = self._clock()
                self._queue.want(adapter_id, request, now)
                state = self._queue.state(adapter_id, now)
                if state is LoadState.STAGED:
                    self._reports.add(adapter_id, LoadReport(request))
                self._changed.notify_all()
        if state in (LoadState.STAGED, LoadState.FAILED):
            self._reports.deliver()
        return state

    def take(self, adapter_id: int) -> T | None:
        """Hands over an adapter that is staged, and makes its place free; None: it is not."""
        with self._changed:
            value = self._queue.take(adapter_id)
            if value is not None:
                self._changed.notify_all()
            return value

    def wait(self, adapter_id: int, request: R, *, timeout_s: float) -> T:
        """Blocks until an adapter is loaded and hands it over, as `take` does.

        It goes before everything in the queue and needs no place among the staged; a load under
        way, or one staged, is shared. All who wait for the same load get the same object. What
        `wait` itself began is not reported to `on_done`.

        Args:
            adapter_id: The adapter.
            request: What to load, where no load has begun.
            timeout_s: Seconds to wait. The load goes on afterwards until it is dropped.

        Raises:
            LoadFailedError: The load failed, had failed a moment ago, or did not end in time.
            LoadDroppedError: The adapter was dropped meanwhile.
            LoaderClosedError: The loader is closed, or was meanwhile.
        """
        deadline = self._clock() + timeout_s
        with self._changed:
            failure = self._failure_of(adapter_id)
            if failure is not None:
                raise LoadFailedError(adapter_id, failure)
            load = self._queue.hurry(adapter_id, request, self._clock())
            self._changed.notify_all()
            while load.value is None:
                if load.failure is not None:
                    raise LoadFailedError(adapter_id, load.failure)
                if self._closed:
                    raise LoaderClosedError
                if not load.wanted:
                    raise LoadDroppedError(adapter_id)
                left_s = deadline - self._clock()
                if left_s <= 0:
                    raise LoadFailedError(
                        adapter_id,
                        LoadFailure(
                            FailureKind.TIMEOUT, f"it was not loaded within {timeout_s:g} s"
                        ),
                    )
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
            self._queue.take_shared(load)
            self._changed.notify_all()
            return load.value

    def drop(self, adapter_id: int) -> None:
        """The adapter is not wanted any more: nobody is told of it, and nothing of it is kept.

        A load under way goes on, since nothing can stop it, and a `want` before its end joins it.
        A failure stays known for the retry delay. Blocks while another thread is in `on_done` for
        this adapter.
        """
        with self._changed:
            self._queue.drop(adapter_id)
            self._changed.notify_all()
            self._reports.retract(adapter_id)

    def forget(self, adapter_id: int) -> None:
        """The adapter was unloaded or its files are others now: as `drop`, and its past is void.

        Neither a failure nor a load under way answers for it any more.
        """
        with self._changed:
            self._queue.forget(adapter_id)
            self._changed.notify_all()
            self._reports.retract(adapter_id)

    def state(self, adapter_id: int) -> LoadState:
        """What the loader has of an adapter."""
        with self._changed:
            return self._queue.state(adapter_id, self._clock())

    def counts(self) -> LoaderCounts:
        """What the loader is busy with."""
        with self._changed:
            return LoaderCounts(
                self._queue.queued,
                self._queue.running,
                self._queue.staged,
                self._threads.hanging,
            )

    def close(self, timeout_s: float) -> bool:
        """Drops everything and ends the threads; the loader is of no use afterwards.

        Args:
            timeout_s: Seconds to wait for loads that are under way. The threads of those that do
                not end are daemons, and end with their load or with the process.

        Returns:
            Whether all threads have ended.
        """
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._reports.clear()
            self._changed.notify_all()
        return self._threads.join(timeout_s)

    # What follows, up to `_work`, is called with the lock held.

    def _failure_of(self, adapter_id: int) -> LoadFailure | None:
        """The failure that answers for an adapter without a load."""
        if self._closed:
            raise LoaderClosedError
        failure = self._queue.failure(adapter_id, self._clock())
        if failure is None and self._queue.state(adapter_id, self._clock()) is LoadState.IDLE:
            failure = self._threads.fill()
        return failure

    def _next_load(self) -> Load[R, T] | None:
        """The next load, as soon as there is one; None once the loader is closed."""
        while not self._closed:
            load = self._queue.start(self._clock())
            if load is not None:
                self._changed.notify_all()
                return load
            self._changed.wait()
        return None

    def _wait_for_deadline(self) -> bool:
        """Returns True when a load is past its time; False once the loader is closed."""
        while not self._closed:
            deadline = self._queue.next_deadline()
            left_s = None if deadline is None else deadline - self._clock()
            if left_s is not None and left_s <= 0:
                return True
            self._changed.wait(left_s)
        return False

    def _return_from(self, load: Load[R, T], outcome: T | LoadFailure) -> bool:
        """Books the end of a load; whether its thread is to go on serving."""
        if load.hanging:  # given up, and told of, before
            serves = self._threads.take_back()
        else:
            serves = True
            self._tell_end(load, outcome)
        self._reports.add(load.adapter_id, self._queue.finish(load, outcome, self._clock()))
        self._changed.notify_all()
        return serves

    def _give_up_hanging(self) -> None:
        """Fails the loads that are past their time, and those that no thread is left for."""
        now = self._clock()
        ended = self._queue.expire(now)
        self._threads.give_up(len(ended))
        stalled = self._threads.fill()
        if stalled is not None:
            ended += self._queue.fail_queued(stalled, now)
        for load, report in ended:
            if load.failure is not None:
                self._tell_end(load, load.failure)
            self._reports.add(load.adapter_id, report)
        self._changed.notify_all()

    def _tell_end(self, load: Load[R, T], outcome: T | LoadFailure) -> None:
        if self._on_end is not None:
            now = self._clock()
            started_at = now if load.started_at is None else load.started_at
            self._on_end(load.request, outcome, now - started_at)

    # What follows is called without the lock.

    def _work(self) -> None:
        """Body of a loader thread."""
        serves = True
        while serves:
            serves = self._load_one()
            self._reports.deliver_from_thread()

    def _load_one(self) -> bool:
        """Waits for a load and carries it out; whether the thread is to go on.

        A frame of its own: an idle thread must not keep alive what it loaded last.
        """
        with self._changed:
            load = self._next_load()
            if load is None:
                return False
            request = load.request
        outcome = self._attempt(request)
        with self._changed:
            return self._return_from(load, outcome)

    def _attempt(self, request: R) -> T | LoadFailure:
        try:
            value = self._load(request)
        except BaseException as error:
            # SystemExit too: a loader thread that ended would take its share of capacity along.
            return self._failure(error)
        if value is None:
            return LoadFailure(FailureKind.INTERNAL, "loading returned nothing")
        return value

    def _failure(self, error: BaseException) -> LoadFailure:
        try:
            kind = self._classify(error)
        except Exception:
            logger.exception("Classifying %r failed", type(error).__name__)
            kind = FailureKind.INTERNAL
        if kind is FailureKind.INTERNAL:
            logger.error("Loading an adapter failed unexpectedly", exc_info=error)
        return LoadFailure(kind, describe_failure(error))

    def _keep_time(self) -> None:
        """Body of the thread that gives up loads which hang."""
        while True:
            with self._changed:
                if not self._wait_for_deadline():
                    return
                self._give_up_hanging()
            self._reports.deliver_from_thread()
