"""The scheduler's part: requests run when their adapter is in its slot, or fail on their own.

vLLM schedules up to `max_loras` different adapters in a step, whichever they are, and leaves it to
the model step to load what is missing. The mixin, over whichever scheduler class vLLM chose,

- holds a request back until its adapter has been read, has its turn for a slot, and is in the slot
  on every rank: no step contains a load or a copy;
- ends the requests of an adapter that cannot be loaded, with the reason, and no others;
- leaves pinned adapters in their slots, and lets the other adapters take turns.

A request that is held back stays where it is in vLLM's waiting queue, like one that waits for its
grammar to be compiled: order, priorities, preemption and aborts are vLLM's own. That queue is a
`FairQueue` of one party, so that a step examines one request of each adapter that none can run with
in it, and one of each adapter's that wait for grammars, and not all of them. Of an adapter that the
store has not answered for, or that waits for a slot while none is free, it examines none.
"""

from __future__ import annotations

import operator
import os
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_multilora.integration.blends import label_of
from vllm_multilora.integration.engine.adapters.users import AdapterUsers
from vllm_multilora.integration.engine.requests import invocation, prefix_keys
from vllm_multilora.integration.engine.requests.late_reloads import HAS_RUN, LateReloads
from vllm_multilora.integration.engine.requests.tenant_wall import tenant_of
from vllm_multilora.integration.engine.requests.weight_versions import Announcements
from vllm_multilora.integration.engine.scheduling.blocked import BlockedAdapters, FreedBlocks
from vllm_multilora.integration.engine.scheduling.fair_queue import (
    FairQueue,
    adapter_of,
    awaited_grammar,
    queue_of,
)
from vllm_multilora.integration.failed_requests import (
    replaced_stop_reason,
    to_stop_reason,
    uninvoked_stop_reason,
    unloaded_stop_reason,
)
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.recording import engine_recorder, request_lists
from vllm_multilora.metrics.request_metrics import RequestMetrics
from vllm_multilora.slots.fairness.fair_shares import FairShares
from vllm_multilora.slots.fairness.slot_turns import SlotTurns
from vllm_multilora.states import AT_HAND, AdapterState

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.engine.adapters.engine_adapters import EngineAdapters

_IDLE_S = 0.001
_LEASE_S = 0.001
"""For leases on adapters in host memory: a request whose lease comes later waits for a step."""
COULD_RUN = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class DeferredCalls:
    """What an engine core has to say to the store, and to those who wait for its answers.

    Whoever hears something goes to work. Where processors are few, that would take them from the
    engine core, and the workers would wait for their next step; said once they have it, it costs
    no request anything. For one thread, but for `say_later`.

    Attributes:
        wait: Whether what is said waits for `flush`: where the workers are other processes that
            compute a step as soon as it was sent.
    """

    def __init__(self) -> None:
        self.wait = False
        self._calls: deque[Callable[[], None]] = deque()

    def say(self, call: Callable[[], None]) -> None:
        """Calls something, now or in the next `flush`; in the order in which it was said."""
        if self.wait:
            self._calls.append(call)
        else:
            call()

    def say_later(self, call: Callable[[], None]) -> None:
        """Has something called in the next `flush`; any thread."""
        self._calls.append(call)

    def flush(self) -> None:
        """Says everything: the workers compute, or an answer is waited for, or nobody waits."""
        while self._calls:
            self._calls.popleft()()


class AdapterAwareMixin:
    """A scheduler that knows which adapters are ready and who has slots.

    Attributes:
        deferred_calls: What waits for a step to be with the workers.
        users: The requests of each adapter.
        recorder: Records the engine core's metrics; None where they are off.
        request_metrics: Those of requests; None likewise.
        adapters: The engine's adapters; None before they are connected, and where vLLM loads them.
        is_connected: Whether it is known who loads adapters.
        executor: The `AdapterExecutorMixin` that has made its class; None where there is none.
    """

    executor: Any = None

    if TYPE_CHECKING:
        waiting: Any
        running: list[Request]
        requests: dict[str, Request]
        kv_cache_manager: Any
        pause_state: PauseState

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]
        self.adapters: EngineAdapters | None = None
        self._slots: int = vllm_config.lora_config.max_loras
        self._turns = SlotTurns()
        self._quarantines = settings_of(vllm_config).quarantine
        self._failing: dict[str, str] = {}  # by request: its stop reason
        self._is_holding = self._has_polled = False  # polled: at the last step's end, nothing since
        self.deferred_calls = DeferredCalls()
        self.users = AdapterUsers()
        self.recorder = engine_recorder(vllm_config)
        self.request_metrics = None if self.recorder is None else RequestMetrics(self.recorder)
        self._lists = None if self.recorder is None else request_lists(vllm_config, self._slots)
        self._blocked = BlockedAdapters(self._turns)
        if isinstance(self.waiting, FCFSRequestQueue | PriorityRequestQueue):
            self.waiting = queue_of(self, FairShares(), lambda request: None)
        self._freed, self._versions = FreedBlocks(), Announcements()
        self._late_reloads = LateReloads()
        self.is_connected = False
        if self.executor is not None:
            self.executor.serve(self)
        prefix_keys.prepare_by(self)

    def attach_adapters(self, adapters: EngineAdapters | None) -> None:
        """From now on requests wait for their adapters; None: vLLM loads them."""
        self.adapters, self.is_connected = adapters, True

    def retire_adapter(self, lora_id: int, limit_s: float, then: Callable[[bool], None]) -> bool:
        """Calls `then` once no request uses an adapter, perhaps at once; see `AdapterUsers.retire`.

        Returns:
            Whether requests use it. Those that still do after `limit_s` are ended in the next step.
        """
        self.users.retire(lora_id, limit_s, then)
        self._let_go()
        return self.users[lora_id] > 0

    def prepare_keys(self, request: Request) -> None:
        """Learns what the keys of a request's blocks contain; any thread."""
        prefix_keys.learn_version(request, self.adapters)

    def _let_go(self) -> None:
        for each in self.users.let_go():
            for request, lora in _requests_of(each.number, self.requests.values()):
                self._failing[request.request_id] = unloaded_stop_reason(lora, each.limit_s)

    def swap_in_flight(self, adapters: EngineAdapters) -> None:
        """Has requests go on with other weights of their adapters, from the next step on."""
        self._versions.swap(adapters.swap(), self.requests.values())

    # What vLLM calls

    def has_requests(self) -> bool:
        """Whether a step has anything to do, be it to end requests; asked before vLLM waits."""
        if super().has_requests() or self.users.overdue:  # type: ignore[misc]
            return True
        if self.adapters is not None:
            _settle(self, self.adapters)
        return False

    def add_request(self, request: Request) -> None:
        """Takes a request in, more input for one, or the end of its input.

        Its adapter is loaded if it is not there.
        """
        if self.executor is not None:
            self.executor.connect()  # to workers that serve: after the engine has started
        if request.lora_request is not None:
            request.lora_request = as_sent(request.lora_request)
        lora = request.lora_request
        self._has_polled = False
        is_new = request.request_id not in self.requests
        super().add_request(request)  # type: ignore[misc]
        if lora is None:
            return
        adapters, lora_id = self.adapters, lora.lora_int_id
        known = self.requests.get(request.request_id)
        if known is None or known.is_finished():
            return  # the end of its input was its end
        is_ready = adapters is None or adapters.state(lora_id) in AT_HAND
        if is_new:
            self.users.come(lora)
            known_adapters = () if adapters is None else adapters.known()
            self.users.forget_accepted(entry.number for entry in known_adapters)
            if self.request_metrics is not None:
                self.request_metrics.accept(
                    request.request_id, lora_id, label_of(lora), is_ready=is_ready
                )
        if adapters is None:
            prefix_keys.use_stock_keys(request)
        elif not (is_new and self._late_reloads.hold(request, adapters)):
            self._fail_earlier(known, lora_id, adapters)
            if (failure := adapters.request_load(lora, tenant_of(request))) is not None:
                self._failing[request.request_id] = to_stop_reason(failure, lora)

    def _fail_earlier(self, latest: Request, lora_id: int, adapters: EngineAdapters) -> None:
        """Ends those whose adapter could not be loaded before another request asks for it again.

        Each new request is a new try: however many come, nobody waits for the outcome of the last.
        """
        if self.users[lora_id] < 2 or adapters.state(lora_id) is not AdapterState.FAILED:
            return
        failure = adapters.failure(lora_id)
        assert failure is not None
        for request, lora in _requests_of(lora_id, self.requests.values()):
            waits = request.status in COULD_RUN and request is not latest
            if waits and not self._late_reloads.holds(request):
                self._failing[request.request_id] = to_stop_reason(failure, lora)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._note_freed(request)
        return super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _note_freed(self, request: Request) -> None:
        # Without adapters of ours nobody asks for these, and no step forgets them.
        if self.adapters is not None and (adapter := adapter_of(request)) is not None:
            self._freed.note(adapter, _blocks_of(request, self.kv_cache_manager))

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._note_freed(request)
        freed = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        if request.lora_request is not None:
            lora_id = request.lora_request.lora_int_id
            if self.request_metrics is not None:
                self.request_metrics.finish(request.request_id, lora_id)
            if self.users.leave(lora_id):
                self._turns.forget(lora_id)
                if self.adapters is not None:
                    self.adapters.drop(lora_id)
        return freed

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._let_go()
        adapters = self.adapters
        if adapters is None:
            _begin_step(self.waiting)
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        # The end of a step has just looked. To ask the system here, without the GIL, would let the
        # thread that sends the last step's outputs go first.
        if not self._has_polled:
            adapters.poll(_LEASE_S)
        self._has_polled = self._is_holding = False
        self.swap_in_flight(adapters)
        self._failing |= self._late_reloads.ask(self.requests, adapters)
        unfilled = adapters.slots.unfilled  # adapters that have lost their slots (sleep)
        for request in [r for r in self.running if adapter_of(r) in unfilled] if unfilled else ():
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
        for lora_id in (pinned := (pins := adapters.slots.pins).adapters):
            self._turns.forget(lora_id)  # it may have waited for its turn when it was pinned
        adapters.begin_step(active := _adapters_of(self.running))
        active, slots = active - pinned, max(1, self._slots - pins.places)
        could_run = partial(_that_could_run, self.requests)
        self._turns.begin_step(active, slots, self._slot_order(), could_run, adapters.is_at_hand)
        self._blocked.begin_step(adapters)
        _begin_step(self.waiting, self._blocked.numbers)
        self._freed.step()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        computes = output.total_num_scheduled_tokens > 0
        adapters.running(_adapters_of(self.running), computes=computes)
        self._versions.scheduled(output)
        if not computes and (self._is_holding or self._blocked.unready):
            self.deferred_calls.flush()
            time.sleep(_IDLE_S)  # else workers answer empty steps as fast as they can
        return output

    def get_grammar_bitmask(self, *args: Any, **kwargs: Any) -> Any:
        """What vLLM asks for, as a rule, once a step is with its workers."""
        bitmask = super().get_grammar_bitmask(*args, **kwargs)  # type: ignore[misc]
        self.deferred_calls.flush()
        return bitmask

    def _slot_order(self) -> Callable[[int], float] | None:
        """By what overdue adapters get slots; None: by how long they have waited."""
        return None

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # In this order: a request that waits for its grammar, say, must not take a slot meanwhile.
        if super()._handle_blocked_waiting_request(request) and self._may_run(request):  # type: ignore[misc]
            return True
        # It cannot run for its adapter's sake, or lacks its grammar, as others do.
        is_alike = adapter_of(request) in self._blocked.numbers or awaited_grammar(request)
        if isinstance(self.waiting, FairQueue) and is_alike:
            self.waiting.pass_over(request)
        return False

    def _may_run(self, request: Request) -> bool:
        lora, adapters = request.lora_request, self.adapters
        if lora is None or adapters is None:
            return True
        lora_id = lora.lora_int_id
        if lora_id in self._blocked.numbers or request.request_id in self._failing:
            return False
        if self._late_reloads.holds(request):
            self._is_holding = True
            return False
        # Nothing is loaded, with everybody waiting, for a request that has no slot yet.
        may_ask = not adapters.asks_late or self._has_turn(lora, adapters)
        if may_ask and self._is_ready(lora, request, adapters) and self._has_turn(lora, adapters):
            if adapters.bring(lora_id):
                part = adapters.part(lora_id, request)
                if prefix_keys.set_version(request, part[0], goes_on=len(part) > 1):
                    self._versions.announce(request, *part)
                    return True
                self._failing[request.request_id] = replaced_stop_reason(lora)
                return False
            self._is_holding = True
            self._turns.place(lora_id)
        if request.request_id not in self._failing:  # else others of its adapter may run
            self._blocked.add(lora_id)
        return False

    def _has_turn(self, lora: LoRARequest, adapters: EngineAdapters) -> bool:
        return lora.lora_int_id in adapters.slots.pins or self._turns.admit(lora.lora_int_id)

    def _is_ready(self, lora: LoRARequest, request: Request, adapters: EngineAdapters) -> bool:
        # One that has run already was not waiting for the reload that may have failed since.
        reload = lora.load_inplace and request.status is not RequestStatus.PREEMPTED
        if adapters.is_ready(lora.lora_int_id, reload=reload):
            version = adapters.version(lora.lora_int_id)
            assert version is not None
            if invocation.is_invoked(request, version):
                return True
            reason = uninvoked_stop_reason(lora, version.invocation_tokens)
        elif (failure := adapters.failure(lora.lora_int_id, reload=reload)) is not None:
            reason = to_stop_reason(failure, lora)
        else:
            self._blocked.add_unready(adapters.known()[lora.lora_int_id])
            return False
        self._failing[request.request_id] = reason
        return False

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Takes in a step's results; requests whose adapter has failed end without them."""
        self.deferred_calls.flush()  # of a step for which no bitmask was asked
        self._versions.computed(scheduler_output)
        failed = self._end_failed(model_runner_output)
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output, *args, **kwargs
        )
        self._versions.step()
        for client, output in failed:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        self._let_go()  # the engine may be idle from now on
        if self._lists is not None:
            with suppress(OSError):  # an engine must not fail for what it shows
                self._lists.say(*self.users.lists(self.running))
        return outputs

    def _end_failed(self, output: Any) -> list[tuple[int, EngineCoreOutput]]:
        """Ends requests whose adapter cannot be had, waiting ones and running ones."""
        adapters = self.adapters
        if adapters is None:
            return []
        adapters.poll()
        self._has_polled = True
        failing, self._failing = self._failing, {}
        lost = adapters.take_lost()
        if self._quarantines:
            lost |= adapters.take_quarantined(output, self.requests)
        # A worker was without an adapter, or its numbers are not finite. What its requests have of
        # this step, and of one that is under way, is thrown away, cached blocks included.
        bad_blocks = self._freed.of(lost.keys())
        for lora_id, failure in lost.items():
            for request, lora in _requests_of(lora_id, self.requests.values()):
                if request.status in HAS_RUN:
                    failing[request.request_id] = to_stop_reason(failure, lora)
                    bad_blocks |= _blocks_of(request, self.kv_cache_manager)
        if bad_blocks:
            self.kv_cache_manager.evict_blocks(bad_blocks)
        if not failing:
            return []
        ended = self.finish_requests(  # type: ignore[attr-defined]
            set(failing), RequestStatus.FINISHED_ERROR
        )
        return [(r.client_index, _last_output(r, failing[r.request_id])) for r in ended]


def as_sent(lora: LoRARequest) -> LoRARequest:
    """What a message to an engine core can hold of it: `LLM` may call one in its own process.

    Raises:
        TypeError: Its number is none, or its path is none.
    """
    number, path = int(operator.index(lora.lora_int_id)), os.fsdecode(lora.lora_path)
    return msgspec.structs.replace(lora, lora_int_id=number, lora_path=path)


def _settle(scheduler: AdapterAwareMixin, adapters: EngineAdapters) -> None:
    """Leaves nothing unsaid and nothing unread, since the engine takes no step for a while.

    What has been read wakes nobody any more. In a pause, other engines' loads may need the host
    memory that adapters wait in.
    """
    scheduler.deferred_calls.flush()  # workers are sent now what it orders
    adapters.poll()
    if scheduler.pause_state is not PauseState.UNPAUSED:
        adapters.yield_host_memory()
    scheduler.swap_in_flight(adapters)
    scheduler.deferred_calls.flush()


def _begin_step(queue: Any, blocked: Container[int | None] = ()) -> None:
    if isinstance(queue, FairQueue):
        queue.begin_step(blocked)


def _blocks_of(request: Request, manager: Any) -> set[int]:
    return {block for group in manager.get_block_ids(request.request_id) for block in group}


def _requests_of(
    lora_id: int, requests: Iterable[Request]
) -> Iterator[tuple[Request, LoRARequest]]:
    for request in requests:
        lora = request.lora_request
        if lora is not None and lora.lora_int_id == lora_id:
            yield request, lora


def _that_could_run(requests: Mapping[str, Request]) -> frozenset[int]:
    """The adapters with a request that waits for nothing of its own."""
    return _adapters_of(request for request in requests.values() if request.status in COULD_RUN)


def _adapters_of(requests: Iterable[Request]) -> frozenset[int]:
    return frozenset(r.lora_request.lora_int_id for r in requests if r.lora_request)


def _last_output(request: Request, stop_reason: str) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=stop_reason,
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )
