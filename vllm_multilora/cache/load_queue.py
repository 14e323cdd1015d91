"""Which adapter loads next, and what became of each: the background loader's logic.

No threads and no clock: whoever owns the queue holds a lock and passes the time.

```
  want ─► QUEUED ─► LOADING ─► STAGED ─► taken
             │         ├─► FAILED ──── retry delay ───► may be wanted again
             │         └─► FAILED, still hanging ─ its load returns, retry delay ─► the same
             └── drop: any state ─► IDLE; what a running load brings is discarded
```
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_multilora.cache.load_failures import FailureKind, LoadFailure

R = TypeVar("R")
T = TypeVar("T")


class LoadState(enum.Enum):
    """What the loader has of an adapter.

    Attributes:
        IDLE: Nothing: never wanted, taken, dropped, or failed longer ago than the retry delay.
        QUEUED: Waiting for a thread or for a place.
        LOADING: A thread is at it.
        STAGED: Loaded, and waiting to be taken.
        FAILED: The last load failed, less than the retry delay ago, or still hangs.
    """

    IDLE = "idle"
    QUEUED = "queued"
    LOADING = "loading"
    STAGED = "staged"
    FAILED = "failed"


@dataclass(frozen=True)
class LoadReport(Generic[R]):
    """What is told of a want that is over.

    Attributes:
        request: The request of the newest want that this answers.
        failure: Why the adapter could not be loaded; None: it is staged.
        queued_s: Seconds from the want to the start of its load; 0 where nothing was loaded.
        load_s: Seconds that the load took; 0 where nothing was loaded.
    """

    request: R
    failure: LoadFailure | None = None
    queued_s: float = 0.0
    load_s: float = 0.0


@dataclass(eq=False)
class Load(Generic[R, T]):
    """One load, from its want to its end.

    Attributes:
        adapter_id: The adapter.
        request: What the newest want asked for, or the wait that began it.
        queued_at: When it was first asked for.
        started_at: When a thread began; None until then.
        urgent: Whether somebody blocks on it: it needs no place.
        asked: Whether a want is to be answered; waits get their answer themselves.
        wanted: False once dropped; True again when asked for anew while the load runs.
        value: What was loaded. Those who wait share it, taken or not.
        failure: Why it failed.
        hanging: Whether it was given up while its thread has not returned.
    """

    adapter_id: int
    request: R
    queued_at: float
    started_at: float | None = None
    urgent: bool = False
    asked: bool = False
    wanted: bool = True
    value: T | None = None
    failure: LoadFailure | None = None
    hanging: bool = False

    def report(self, now: float) -> LoadReport[R] | None:
        """What the wants are told at this time; None where nobody is to be told."""
        if not self.asked:
            return None
        started_at = now if self.started_at is None else self.started_at
        return LoadReport(self.request, self.failure, started_at - self.queued_at, now - started_at)


@dataclass
class _Remembered(Generic[R, T]):
    """A failure that answers wants until `retry_at`, and as long as its load hangs."""

    failure: LoadFailure
    retry_at: float
    load: Load[R, T]

    def holds(self, now: float) -> bool:
        return self.load.hanging or now < self.retry_at


class LoadQueue(Generic[R, T]):
    """Loads in the order of their wants, as many at a time as there are places.

    Args:
        staged_limit: Most adapters that are loading or staged; urgent ones may exceed it.
        timeout_s: Seconds after which a load is given up.
        retry_delay_s: Seconds after a failure in which wants get the same failure again.
    """

    def __init__(self, *, staged_limit: int, timeout_s: float, retry_delay_s: float):
        self._staged_limit = staged_limit
        self._timeout_s = timeout_s
        self._retry_delay_s = retry_delay_s
        # The load that answers for an adapter: queued, loading (dropped or not) or staged.
        self._loads: dict[int, Load[R, T]] = {}
        self._queued: OrderedDict[int, Load[R, T]] = OrderedDict()
        # In the order of their start, and so of their deadlines; also those that no adapter has
        # a claim on any more.
        self._running: dict[Load[R, T], None] = {}
        self._staged: set[int] = set()
        self._failures: dict[int, _Remembered[R, T]] = {}

    @property
    def queued(self) -> int:
        """Number of adapters that wait for a thread or a place."""
        return len(self._queued)

    @property
    def running(self) -> int:
        """Number of loads under way and in time."""
        return len(self._running)

    @property
    def staged(self) -> int:
        """Number of adapters loaded and not taken."""
        return len(self._staged)

    def state(self, adapter_id: int, now: float) -> LoadState:
        """What there is of an adapter."""
        if self.failure(adapter_id, now) is not None:
            return LoadState.FAILED
        load = self._loads.get(adapter_id)
        if load is None or not load.wanted:
            return LoadState.IDLE
        if adapter_id in self._staged:
            return LoadState.STAGED
        return LoadState.QUEUED if adapter_id in self._queued else LoadState.LOADING

    def failure(self, adapter_id: int, now: float) -> LoadFailure | None:
        """The failure that answers wants of an adapter now, if there is one."""
        remembered = self._failures.get(adapter_id)
        if remembered is None or not remembered.holds(now):
            return None
        return remembered.failure

    def want(self, adapter_id: int, request: R, now: float) -> Load[R, T]:
        """The load that answers for the adapter, queued if there was none.

        The caller has made sure that no failure answers. The load's answer goes to the newest
        request; what is loaded is what the request said at the start.
        """
        load = self._find_or_queue(adapter_id, request, now)
        load.request = request
        load.asked = True
        return load

    def hurry(self, adapter_id: int, request: R, now: float) -> Load[R, T]:
        """The load that answers for an adapter that somebody blocks on, first in the queue.

        As `want`, but the answer still goes to the newest want, and the limit does not hold the
        load: who blocks may be who would make room by taking.
        """
        load = self._find_or_queue(adapter_id, request, now)
        load.urgent = True
        if adapter_id in self._queued:
            self._queued.move_to_end(adapter_id, last=False)
        return load

    def start(self, now: float) -> Load[R, T] | None:
        """The next load, now running; None where there is none or no place for it."""
        load = next(iter(self._queued.values()), None)
        if load is None:
            return None
        if not load.urgent and len(self._running) + len(self._staged) >= self._staged_limit:
            return None
        del self._queued[load.adapter_id]
        self._running[load] = None
        load.started_at = now
        return load

    def finish(
        self, load: Load[R, T], outcome: T | LoadFailure, now: float
    ) -> LoadReport[R] | None:
        """A running load ended; returns what is to be reported, if anything.

        Nothing is reported, and a value is discarded, where the load was dropped or had been
        given up.
        """
        if load.hanging:
            load.hanging = False
            return None
        del self._running[load]
        if isinstance(outcome, LoadFailure):
            return self._fail(load, outcome, now)
        if not self._answers(load):
            return None
        if not load.wanted:
            del self._loads[load.adapter_id]
            return None
        load.value = outcome
        self._staged.add(load.adapter_id)
        return load.report(now)

    def next_deadline(self) -> float | None:
        """When the oldest running load is to be given up; None where nothing runs."""
        oldest = next(iter(self._running), None)
        if oldest is None or oldest.started_at is None:
            return None
        return oldest.started_at + self._timeout_s

    def expire(self, now: float) -> list[tuple[Load[R, T], LoadReport[R] | None]]:
        """Gives up the loads that are past their time; each with what is to be reported of it."""
        expired = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            load = next(iter(self._running))
            del self._running[load]
            load.hanging = True
            failure = LoadFailure(
                FailureKind.TIMEOUT,
                f"loading took longer than {self._timeout_s:g} s and was given up; "
                "the storage may hang",
            )
            expired.append((load, self._fail(load, failure, now)))
        return expired

    def fail_queued(
        self, failure: LoadFailure, now: float
    ) -> list[tuple[Load[R, T], LoadReport[R] | None]]:
        """Fails everything in the queue, without holding it against the adapters."""
        loads = list(self._queued.values())
        self._queued.clear()
        for load in loads:
            load.failure = failure
            del self._loads[load.adapter_id]
        return [(load, load.report(now)) for load in loads]

    def take(self, adapter_id: int) -> T | None:
        """Hands over what is staged of an adapter and makes its place free; None: nothing is."""
        if adapter_id not in self._staged:
            return None
        self._staged.remove(adapter_id)
        return self._loads.pop(adapter_id).value

    def take_shared(self, load: Load[R, T]) -> None:
        """Makes the place of a staged load free, unless another who waited has done so."""
        if self._answers(load):
            self.take(load.adapter_id)

    def drop(self, adapter_id: int) -> None:
        """The adapter is not wanted any more.

        A running load goes on, since nothing can stop it; a new want before its end joins it.
        Failures stay: otherwise whoever aborts and asks again gets round the retry delay.
        """
        load = self._loads.get(adapter_id)
        if load is None:
            return
        if load in self._running:
            load.wanted = load.asked = False
        else:
            self._disown(load)

    def forget(self, adapter_id: int) -> None:
        """The adapter is another one from now on: drops it, its running load and its failure."""
        self._failures.pop(adapter_id, None)
        load = self._loads.get(adapter_id)
        if load is not None:
            self._disown(load)

    def clear(self) -> None:
        """Drops everything."""
        for load in list(self._loads.values()):
            self._disown(load)
        self._failures.clear()

    def _find_or_queue(self, adapter_id: int, request: R, now: float) -> Load[R, T]:
        load = self._loads.get(adapter_id)
        if load is None:
            load = Load(adapter_id, request, now)
            self._loads[adapter_id] = self._queued[adapter_id] = load
        load.wanted = True
        return load

    def _answers(self, load: Load[R, T]) -> bool:
        """Whether the load still is its adapter's: not after `forget`."""
        return self._loads.get(load.adapter_id) is load

    def _disown(self, load: Load[R, T]) -> None:
        del self._loads[load.adapter_id]
        self._queued.pop(load.adapter_id, None)
        self._staged.discard(load.adapter_id)
        load.wanted = load.asked = False

    def _fail(self, load: Load[R, T], failure: LoadFailure, now: float) -> LoadReport[R] | None:
        load.failure = failure
        if not self._answers(load):
            return None
        del self._loads[load.adapter_id]
        for stale in [i for i, known in self._failures.items() if not known.holds(now)]:
            del self._failures[stale]
        self._failures[load.adapter_id] = _Remembered(failure, now + self._retry_delay_s, load)
        return load.report(now)
