"""The engine core's view of its workers' adapters: asks for loads, knows what is ready.

Two ways of asking, behind one interface. `BackgroundGate`: workers load on threads and answer
through a log in shared memory, which costs a few microseconds a step to read. `BlockingGate`: the
engine waits while all workers load; where workers are on other machines, and where background
loading is off.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from vllm_multilora.cache.load_failures import LoadFailure
from vllm_multilora.cache.readiness import Readiness, Standing
from vllm_multilora.cache.readiness_events import (
    Displaced,
    Event,
    Failed,
    Lost,
    Missed,
    Placed,
    Ready,
)
from vllm_multilora.cache.readiness_log import ReadinessLog
from vllm_multilora.integration import worker_calls
from vllm_multilora.integration.failures import AdapterRefusedError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

LOG_PATH_VARIABLE = "MULTILORA_READINESS_LOG"
"""Tells workers where the log is; set by the engine core while it starts them."""

LOST_IN_STEP = 0
"""Serial number of a failure that answers no request: a step came before the adapter."""

_POLL_S = 0.002
_MOST_UNREAD = 2


class AdapterGate(Protocol):
    """What the scheduler asks before it admits a request.

    Attributes:
        blocks: Whether asking for an adapter's standing may keep everybody waiting.
    """

    blocks: bool

    def want(self, request: LoRARequest) -> None:
        """A request for the adapter has arrived."""

    def poll(self) -> None:
        """Takes in what has happened since; once per step."""

    def standing(self, request: LoRARequest) -> Standing:
        """Whether the adapter is ready on all ranks; asks for it if nobody has."""

    def is_placed(self, lora_id: int) -> bool:
        """Whether a ready adapter has its slots, as far as it can before a step has it.

        Where it has not, and it was not asked for, the next `place` asks.
        """

    def place(self, needed: frozenset[int]) -> None:
        """Has adapters brought into slots that nobody needs, beside the steps.

        Args:
            needed: The adapters of the step that has just been scheduled.
        """

    def failure(self, lora_id: int) -> LoadFailure | None:
        """Why an adapter could not be loaded; None unless its standing is FAILED."""

    def take_lost(self) -> dict[int, LoadFailure]:
        """Adapters that some worker was without in a step since the last call, and why."""

    def drop(self, lora_id: int) -> None:
        """No request waits for the adapter any more."""

    def forget(self, lora_id: int) -> None:
        """The adapter was removed."""

    def register(self, request: LoRARequest) -> Future[bool]:
        """Has an adapter loaded and checked for its registration."""


Call = Callable[..., Any]
"""`collective_rpc` of vLLM's executor."""


class BackgroundGate:
    """Asks workers to load in the background and reads their answers from the log.

    Args:
        call: The executor's `collective_rpc`; used from the engine core's main thread only.
        log: The workers have attached to it.
        ranks: Number of workers.
        wake: Makes the main thread come to `poll` soon, though the engine may be idle; None
            where nobody waits for the engine while it is.
    """

    blocks = False

    def __init__(
        self, call: Call, log: ReadinessLog, ranks: int, wake: Callable[[], None] | None
    ) -> None:
        self._call = call
        self._log = log
        self._readiness = Readiness(ranks)
        # Slots instead of host memory: READY is placed.
        self._placements = Readiness(ranks)
        self._to_place: dict[int, int] = {}
        self._requests: dict[int, LoRARequest] = {}
        self._lost: dict[int, LoadFailure] = {}
        self._outbox: list[worker_calls.Order] = []
        self._sent: deque[Any] = deque()
        self._wake = wake
        self._registrations: dict[int, tuple[LoRARequest, list[Future[bool]]]] = {}
        self._waker: threading.Thread | None = None

    def want(self, request: LoRARequest) -> None:
        standing = self._readiness.state(request.lora_int_id)
        known = self._requests.get(request.lora_int_id)
        is_other = known is not None and known.lora_path != request.lora_path
        # After a failure, a new request is a new try.
        if standing in (Standing.UNKNOWN, Standing.FAILED) or is_other:
            self._ask(request)

    def _ask(self, request: LoRARequest) -> None:
        lora_id = request.lora_int_id
        self._requests[lora_id] = request
        self._outbox.append(worker_calls.Prefetch(request, self._readiness.ask(lora_id)))

    def poll(self) -> None:
        drained = self._log.drain()
        if drained:
            for _, event in drained:
                if isinstance(event, Failed) and event.serial == LOST_IN_STEP:
                    self._lost[event.adapter_id] = event.failure
                    self._readiness.forget(event.adapter_id)
            self._readiness.update(
                (rank, event)
                for rank, event in drained
                if not isinstance(event, Placed | Displaced)
            )
            for lora_id in self._readiness.to_ask_again():
                self._ask(self._requests[lora_id])
            self._update_placements(drained)
        self._settle_registrations()
        self._send()

    def _update_placements(self, drained: Iterable[tuple[int, Event | Missed]]) -> None:
        for rank, event in drained:
            if isinstance(event, Placed):
                self._placements.update([(rank, Ready(event.adapter_id, event.serial))])
            elif isinstance(event, Displaced | Lost):
                self._placements.update([(rank, Lost(event.adapter_id))])
            elif isinstance(event, Missed):
                self._placements.update([(rank, event)])
        for lora_id in self._placements.to_ask_again():
            self._placements.forget(lora_id)

    def is_placed(self, lora_id: int) -> bool:
        standing = self._placements.state(lora_id)
        if standing is Standing.UNKNOWN:
            self._to_place[lora_id] = self._placements.ask(lora_id)
        return standing is Standing.READY

    def place(self, needed: frozenset[int]) -> None:
        self._outbox += [
            worker_calls.Place(lora_id, serial, needed)
            for lora_id, serial in self._to_place.items()
        ]
        self._to_place.clear()
        self._send()

    def _send(self) -> None:
        """Sends what there is to say, in one call, without waiting for the workers."""
        if not self._outbox:
            return
        orders, self._outbox = self._outbox, []
        self._sent.append(self._call(worker_calls.carry_out, args=(orders,), non_block=True))
        # Replies must be read sometime, or the workers cannot send any more. Steps read them in
        # passing; while there are none the workers are idle and answer at once.
        while len(self._sent) > _MOST_UNREAD:
            self._sent.popleft().result()

    def standing(self, request: LoRARequest) -> Standing:
        standing = self._readiness.state(request.lora_int_id)
        if standing is Standing.UNKNOWN:
            self._ask(request)
            return Standing.LOADING
        return standing

    def failure(self, lora_id: int) -> LoadFailure | None:
        return self._readiness.failure(lora_id)

    def take_lost(self) -> dict[int, LoadFailure]:
        lost, self._lost = self._lost, {}
        return lost

    def drop(self, lora_id: int) -> None:
        if self._readiness.state(lora_id) is Standing.UNKNOWN or lora_id in self._registrations:
            return
        # Staged or loading; one that is in host memory stays there and is asked for again.
        self.forget(lora_id)
        self._outbox.append(worker_calls.Drop(lora_id))

    def forget(self, lora_id: int) -> None:
        self._readiness.forget(lora_id)
        self._placements.forget(lora_id)
        self._to_place.pop(lora_id, None)
        self._requests.pop(lora_id, None)

    def register(self, request: LoRARequest) -> Future[bool]:
        future: Future[bool] = Future()
        waiting = self._registrations.setdefault(request.lora_int_id, (request, []))[1]
        waiting.append(future)
        if request.load_inplace:
            self._ask(request)
        else:
            self.want(request)
        self.poll()
        if not future.done() and self._wake is not None:
            self._keep_waking()
        return future

    def _settle_registrations(self) -> None:
        for lora_id, (request, futures) in list(self._registrations.items()):
            standing = self._readiness.state(lora_id)
            if standing is Standing.UNKNOWN:  # lost or removed while it was being registered
                self._ask(request)
            elif standing is Standing.READY:
                del self._registrations[lora_id]
                self._outbox.append(worker_calls.Keep(lora_id))
                for future in futures:
                    future.set_result(True)
            elif standing is Standing.FAILED:
                failure = self._readiness.failure(lora_id)
                assert failure is not None
                del self._registrations[lora_id]
                self.forget(lora_id)
                error = _refused(self._call, lora_id, failure)
                self._outbox.append(worker_calls.Drop(lora_id))
                for future in futures:
                    future.set_exception(error)

    def _keep_waking(self) -> None:
        """Has the main thread look at the log while registrations wait: it may be idle."""
        if self._waker is None or not self._waker.is_alive():
            self._waker = threading.Thread(
                target=self._wake_while_registering, name="multilora-waker", daemon=True
            )
            self._waker.start()

    def _wake_while_registering(self) -> None:
        assert self._wake is not None
        while self._registrations:
            self._wake()
            time.sleep(_POLL_S)


class BlockingGate:
    """Has workers load while the engine waits.

    Args:
        call: The executor's `collective_rpc`.
    """

    blocks = True

    def __init__(self, call: Call) -> None:
        self._call = call
        self._failures: dict[int, LoadFailure] = {}

    def want(self, request: LoRARequest) -> None:
        self._failures.pop(request.lora_int_id, None)

    def poll(self) -> None:
        """Nothing happens behind this gate's back."""

    def standing(self, request: LoRARequest) -> Standing:
        lora_id = request.lora_int_id
        if lora_id not in self._failures:
            answers = self._call(worker_calls.ensure, args=(request,))
            failures = [failure for failure in answers if failure is not None]
            if not failures:
                return Standing.READY
            self._failures[lora_id] = failures[0]
        return Standing.FAILED

    def is_placed(self, lora_id: int) -> bool:
        return True  # a step that has it brings it there

    def place(self, needed: frozenset[int]) -> None:
        """Nothing is ever asked for."""

    def failure(self, lora_id: int) -> LoadFailure | None:
        return self._failures.get(lora_id)

    def take_lost(self) -> dict[int, LoadFailure]:
        return {}  # workers hold what they were made to load until a step has used it

    def drop(self, lora_id: int) -> None:
        self.forget(lora_id)

    def forget(self, lora_id: int) -> None:
        self._failures.pop(lora_id, None)

    def register(self, request: LoRARequest) -> Future[bool]:
        future: Future[bool] = Future()
        self.want(request)
        if self.standing(request) is Standing.READY:
            self._call(worker_calls.carry_out, args=([worker_calls.Keep(request.lora_int_id)],))
            future.set_result(True)
        else:
            failure = self._failures.pop(request.lora_int_id)
            future.set_exception(_refused(self._call, request.lora_int_id, failure))
        return future


def _refused(call: Call, lora_id: int, failure: LoadFailure) -> AdapterRefusedError:
    """The error of a registration, with all problems that some worker has found."""
    found = call(worker_calls.problems, args=(lora_id,))
    return AdapterRefusedError(lora_id, failure, next(filter(None, found), []))


def create_log(instance_id: str, ranks: int) -> ReadinessLog:
    """The log of an engine that is about to start its workers, which inherit its path."""
    log = ReadinessLog(instance_id, ranks)
    os.environ[LOG_PATH_VARIABLE] = str(log.path)
    return log


def seal_log(log: ReadinessLog) -> bool:
    """Ends the start: nobody attaches any more. Whether all workers have attached."""
    os.environ.pop(LOG_PATH_VARIABLE, None)
    missing = log.missing_ranks()
    if missing:
        logger.warning(
            "Workers %s have not attached to the log of ready adapters (are they on another "
            "machine?): the engine will wait while adapters are loaded.",
            ", ".join(map(str, missing)),
        )
        log.close()
        return False
    log.seal()
    return True
