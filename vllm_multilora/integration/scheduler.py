"""The scheduler's part: requests run when their adapter is ready and has a slot, or fail alone.

vLLM schedules up to `max_loras` different adapters in a step, whichever they are, and leaves it to
the model step to load what is missing. The mixin, over whichever scheduler class vLLM chose,

- holds a request back until its adapter is in host memory on every rank and, where others run
  meanwhile, in a slot if one can be spared: their steps do not contain the copy;
- ends the requests of an adapter that cannot be had, with the reason, and no others;
- leaves pinned adapters their slots, and has the other adapters take turns.

A request that is held back stays where it is in vLLM's waiting queue, as one does that waits for
its grammar to be compiled: order, priorities, preemption and aborts are vLLM's own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_multilora.cache.readiness import Standing
from vllm_multilora.cache.turns import SlotTurns
from vllm_multilora.integration.activation import kernel_backend, settings_of
from vllm_multilora.integration.failures import to_stop_reason, unloaded_stop_reason
from vllm_multilora.integration.metrics import engine_recorder
from vllm_multilora.metrics.request_metrics import RequestMetrics

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.adapter_gate import AdapterGate

_IDLE_S = 0.001


@dataclass(frozen=True)
class _Leaving:
    """An adapter on its way out: when its requests are ended, and what is done then."""

    deadline: float
    limit_s: float
    then: Callable[[], None]


class AdapterAwareMixin:
    """A scheduler that knows which adapters are ready and who has slots.

    Attributes:
        adapter_requests: Requests accepted so far by adapter, until it is removed.
    """

    if TYPE_CHECKING:
        running: list[Request]
        requests: dict[str, Request]

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]
        self._gate: AdapterGate | None = None
        self._pinned_names = frozenset(settings_of(vllm_config).pin)
        self._pinned_ids: set[int] = set()
        self._slots: int = vllm_config.lora_config.max_loras
        self._turns = SlotTurns()
        self._failing: dict[str, str] = {}  # by request: its stop reason
        self._leaving: dict[int, _Leaving] = {}
        self._is_holding = False
        self.adapter_requests: Counter[int] = Counter()
        recorder = engine_recorder(vllm_config)
        self._metrics = None if recorder is None else RequestMetrics(recorder)
        self._running_ids: frozenset[int] = frozenset()
        # Adapters that have their turn and are on their way into a slot.
        self._placing: set[int] = set()

    # What the engine core tells

    def attach_gate(self, gate: AdapterGate) -> None:
        """From now on requests wait for their adapters."""
        self._gate = gate

    def pin_adapter(self, lora_id: int) -> None:
        """From now on the adapter keeps its slot."""
        self._pinned_ids.add(lora_id)

    def remove_adapter(self, lora_id: int) -> None:
        """The adapter is gone, and so is its pin; one that was pinned by name keeps it."""
        self._pinned_ids.discard(lora_id)
        self.adapter_requests.pop(lora_id, None)
        if self._gate is not None:
            self._gate.forget(lora_id)

    def retire_adapter(self, lora_id: int, limit_s: float, then: Callable[[], None]) -> None:
        """Calls `then` once no request uses an adapter.

        Args:
            lora_id: The adapter; nobody sends requests for it any more.
            limit_s: Seconds after which requests that still use it are ended.
            then: Called between two steps, perhaps at once.
        """
        self._leaving[lora_id] = _Leaving(time.monotonic() + limit_s, limit_s, then)
        self._retire()

    def _retire(self) -> None:
        if not self._leaving:
            return
        users = {r.lora_request.lora_int_id for r in self.requests.values() if r.lora_request}
        for lora_id, leaving in list(self._leaving.items()):
            if lora_id not in users:
                del self._leaving[lora_id]
                leaving.then()
            elif time.monotonic() > leaving.deadline:
                for request in self.requests.values():
                    lora = request.lora_request
                    if lora and lora.lora_int_id == lora_id:
                        reason = unloaded_stop_reason(lora, leaving.limit_s)
                        self._failing[request.request_id] = reason

    # What vLLM calls

    def add_request(self, request: Request) -> None:
        """Takes a request in, and has its adapter loaded if it is not there."""
        is_new = request.request_id not in self.requests  # else: more input for one
        super().add_request(request)  # type: ignore[misc]
        lora = request.lora_request
        if lora is None:
            return
        is_ready = self._gate is None
        if self._gate is not None:
            self._gate.want(lora)
            is_ready = not self._gate.blocks and self._gate.standing(lora) is Standing.READY
        if is_new:
            self.adapter_requests[lora.lora_int_id] += 1
            if self._metrics is not None:
                self._metrics.accept(
                    request.request_id, lora.lora_int_id, lora.lora_name, is_ready=is_ready
                )

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._metrics is not None and request.lora_request is not None:
            self._metrics.finish(request.request_id, request.lora_request.lora_int_id)
        return freed

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedules a step."""
        self._retire()
        if self._gate is not None:
            self._gate.poll()
            self._note_arrivals(self._gate)
        running = {
            r.lora_request.lora_int_id: r.lora_request for r in self.running if r.lora_request
        }
        active = {lora_id for lora_id, lora in running.items() if not self._is_pinned(lora)}
        pins = len(self._pinned_names) + len(self._pinned_ids)
        self._turns.begin_step(active | self._placing, max(1, self._slots - pins))
        self._running_ids = frozenset(running)
        self._placing.clear()
        self._is_holding = False
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self._is_holding and self._gate is not None:
            self._gate.place(_adapters_of(self.running))
        if self._is_holding and not output.total_num_scheduled_tokens and not self._failing:
            # Nothing to do until an adapter has arrived: do not ask the workers for empty steps
            # as fast as they can answer.
            time.sleep(_IDLE_S)
        return output

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        # In this order: a request that waits for its grammar, say, must not take a slot meanwhile.
        return super()._handle_blocked_waiting_request(request) and self._may_run(request)  # type: ignore[misc]

    def _note_arrivals(self, gate: AdapterGate) -> None:
        """Ends the wait for adapters that have come, though nobody's turn may have come yet."""
        if self._metrics is None or gate.blocks:
            return
        for request_id in self._metrics.waiting:
            request = self.requests.get(request_id)
            lora = None if request is None else request.lora_request
            if lora is not None and gate.standing(lora) is not Standing.LOADING:
                self._metrics.settled(lora.lora_int_id)

    def _may_run(self, request: Request) -> bool:
        lora = request.lora_request
        if lora is None:
            return True
        if self._gate is None:
            return self._has_turn(lora)
        if self._gate.blocks:
            # Nothing is loaded, with everybody waiting, for a request that has no slot yet.
            return self._has_turn(lora) and self._is_ready(lora, request)
        return self._is_ready(lora, request) and self._has_turn(lora) and self._is_placed(lora)

    def _is_placed(self, lora: LoRARequest) -> bool:
        assert self._gate is not None
        lora_id = lora.lora_int_id
        # A step that keeps nobody else waiting may as well contain the copy.
        if not self.running or lora_id in self._running_ids or self._gate.is_placed(lora_id):
            return True
        self._is_holding = True
        if not self._is_pinned(lora):
            self._placing.add(lora_id)
        return False

    def _has_turn(self, lora: LoRARequest) -> bool:
        return self._is_pinned(lora) or self._turns.admit(lora.lora_int_id)

    def _is_ready(self, lora: LoRARequest, request: Request) -> bool:
        assert self._gate is not None
        standing = self._gate.standing(lora)
        if self._gate.blocks and self._metrics is not None:
            self._metrics.settled(lora.lora_int_id)
        if standing is Standing.READY:
            return True
        self._turns.forget(lora.lora_int_id)  # no slot is kept for what cannot use it
        if standing is Standing.FAILED:
            failure = self._gate.failure(lora.lora_int_id)
            assert failure is not None
            self._failing[request.request_id] = to_stop_reason(failure, lora)
        else:
            self._is_holding = True
        return False

    def _is_pinned(self, lora: LoRARequest) -> bool:
        if lora.lora_name in self._pinned_names:
            self._pinned_ids.discard(lora.lora_int_id)  # pinned by call as well: one slot
            return True
        return lora.lora_int_id in self._pinned_ids

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Takes in a step's results; requests whose adapter has failed end without them."""
        failed = self._end_failed()
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        for client, output in failed:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        self._retire()  # the engine may be idle from now on
        return outputs

    def _end_failed(self) -> list[tuple[int, EngineCoreOutput]]:
        """Ends requests whose adapter cannot be had, waiting ones and running ones."""
        if self._gate is None:
            return []
        self._gate.poll()
        failing, self._failing = self._failing, {}
        lost = self._gate.take_lost()
        # A worker was without an adapter and could not read it again. The tokens of its requests
        # in this step, and in one that is under way, were computed without it: they are thrown
        # away, cached blocks included.
        for request in self.running if lost else ():
            lora = request.lora_request
            if lora is not None and lora.lora_int_id in lost:
                failing[request.request_id] = to_stop_reason(lost[lora.lora_int_id], lora)
                self._uncache(request.request_id)
        if not failing:
            return []
        ended = self.finish_requests(set(failing), RequestStatus.FINISHED_ERROR)
        return [(r.client_index, _last_output(r, failing[r.request_id])) for r in ended]

    def _uncache(self, request_id: str) -> None:
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        blocks = {block for group in manager.get_block_ids(request_id) for block in group}
        manager.evict_blocks(blocks)

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        """Ends requests from outside a step; the last one that waits for an adapter drops it."""
        waiting = {
            request.lora_request.lora_int_id
            for request in map(self.requests.get, _as_ids(request_ids, self.requests))
            if request is not None
            and request.lora_request is not None
            and request.status is not RequestStatus.RUNNING
        }
        ended = super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        if waiting:
            wanted = {r.lora_request.lora_int_id for r in self.requests.values() if r.lora_request}
            for lora_id in waiting - wanted:
                self._turns.forget(lora_id)
                if self._gate is not None:
                    self._gate.drop(lora_id)
        return ended


def _adapters_of(requests: list[Request]) -> frozenset[int]:
    return frozenset(r.lora_request.lora_int_id for r in requests if r.lora_request)


def _as_ids(request_ids: Any, all_requests: dict[str, Request]) -> list[str]:
    if request_ids is None:
        return list(all_requests)
    return [request_ids] if isinstance(request_ids, str) else list(request_ids)


def _last_output(request: Request, stop_reason: str) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=stop_reason,
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )


@lru_cache
def adapter_aware(scheduler: type) -> type:
    """A scheduler class that makes an `AdapterAwareMixin` of itself where the plugin is active.

    Where it is not, an instance is exactly of the class given.
    """

    class AdapterAwareScheduler(AdapterAwareMixin, scheduler):
        def __new__(cls, *args: Any, vllm_config: Any, **kwargs: Any) -> Any:
            if vllm_config.lora_config is None or kernel_backend(vllm_config) == "vllm":
                return scheduler(*args, vllm_config=vllm_config, **kwargs)
            return super().__new__(cls)

    name = f"AdapterAware{scheduler.__name__}"
    AdapterAwareScheduler.__name__ = AdapterAwareScheduler.__qualname__ = name
    return AdapterAwareScheduler
