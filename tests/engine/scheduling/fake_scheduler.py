"""What `AdapterAwareMixin` needs of vLLM's scheduler, and no more: queues, and when it asks."""

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from vllm_multilora.integration.engine.scheduling.scheduler import AdapterAwareMixin


@dataclass(eq=False)
class FakeRequest:
    request_id: str
    lora_request: LoRARequest | None = None
    has_grammar: bool = True
    status: RequestStatus = RequestStatus.WAITING
    steps: int = 0
    client_index: int = 0
    trace_headers: None = None
    num_computed_tokens: int = 0
    prompt_embeds: None = None
    mm_features: list[Any] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_output_tokens(self) -> int:
        return self.steps

    def is_finished(self) -> bool:
        return RequestStatus.is_finished(self.status)

    def update_block_hashes(self) -> None:
        """There are no blocks to hash."""

    def take_events(self) -> None:
        return None

    def get_finished_reason(self) -> FinishReason | None:
        return RequestStatus.get_finished_reason(self.status)


@dataclass
class FakeOutput:
    """Output of a step: the requests that are done, and tokens."""

    done: tuple[str, ...] = ()
    tokens: dict[str, list[int]] = field(default_factory=dict)
    num_nans_in_logits: None = None
    pooler_output: None = None

    @property
    def req_id_to_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.tokens)}

    @property
    def sampled_token_ids(self) -> list[list[int]]:
        return list(self.tokens.values())


@dataclass
class FakeBlocks:
    """Blocks of the cache, one for each request that has run and not given it back."""

    used: set[str] = field(default_factory=set)
    evicted: set[str] = field(default_factory=set)

    def get_block_ids(self, request_id: str) -> tuple[list[str]]:
        return ([request_id] if request_id in self.used else [],)

    def evict_blocks(self, blocks: set[str]) -> None:
        self.evicted |= blocks


class FakeScheduler:
    """Schedules all that its mixin lets run, the running requests first; `max_loras` in a step."""

    pause_state = PauseState.UNPAUSED

    def __init__(self, *, vllm_config: Any) -> None:
        self.max_loras = vllm_config.lora_config.max_loras
        self.waiting: deque[FakeRequest] = deque()
        self.running: list[FakeRequest] = []
        self.requests: dict[str, FakeRequest] = {}
        self.kv_cache_manager = FakeBlocks()
        self.structured_output_manager = SimpleNamespace()
        self.preempted: list[str] = []

    def add_request(self, request: FakeRequest) -> None:
        self.waiting.append(request)
        self.requests[request.request_id] = request

    def schedule(self) -> Any:
        adapters = {r.lora_request.lora_int_id for r in self.running if r.lora_request}
        skipped = []
        while self.waiting:
            request = self.waiting.popleft()
            number = request.lora_request.lora_int_id if request.lora_request else None
            if not self._handle_blocked_waiting_request(request) or (
                number and number not in adapters and len(adapters) == self.max_loras
            ):
                skipped.append(request)
                continue
            adapters |= {number} if number else set()
            request.status = RequestStatus.RUNNING
            self.kv_cache_manager.used.add(request.request_id)
            self.running.append(request)
        self.waiting.extend(skipped)
        for request in self.running:
            request.steps += 1
        return SimpleNamespace(total_num_scheduled_tokens=len(self.running))

    def get_grammar_bitmask(self, scheduler_output: Any) -> None:
        """Nobody has a grammar."""

    def has_requests(self) -> bool:
        return bool(self.requests)

    def _handle_blocked_waiting_request(self, request: FakeRequest) -> bool:
        return request.has_grammar

    def update_from_output(self, scheduler_output: Any, output: FakeOutput) -> dict:
        for request in [r for r in self.running if r.request_id in output.done]:
            request.status = RequestStatus.FINISHED_STOPPED
            self.running.remove(request)
            self._free_request(request)
        return {}

    def finish_requests(self, request_ids: Any, status: RequestStatus) -> list[FakeRequest]:
        ids = list(self.requests) if request_ids is None else request_ids
        ended = [self.requests[i] for i in ids if i in self.requests]
        for request in ended:
            (self.running if request in self.running else self.waiting).remove(request)
            request.status = status
            self._free_request(request)
        return ended

    def _preempt_request(self, request: FakeRequest, timestamp: float) -> None:
        request.status = RequestStatus.PREEMPTED
        self.kv_cache_manager.used.discard(request.request_id)
        self.preempted.append(request.request_id)
        self.waiting.appendleft(request)

    def _free_request(self, request: FakeRequest, delay_free_blocks: bool = False) -> None:
        self.kv_cache_manager.used.discard(request.request_id)
        if not delay_free_blocks:
            del self.requests[request.request_id]


class AwareScheduler(AdapterAwareMixin, FakeScheduler):
    """As `scheduler_over` makes them."""
