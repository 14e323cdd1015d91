"""The scheduler's part of fair shares: who is first in a step, and what others may add to it.

vLLM takes waiting requests in the order of their arrival, and computes as much of a prompt in a
step as there is room for. So a tenant with many clients and long prompts is served before all
others, and their tokens wait for its prompts. The mixin, over `AdapterAwareMixin`,

- puts the request of the flow served least at the head of the queue (`FairQueue`) and of the
  running requests, so that the flow served most is preempted first;
- bounds what all *heavy* flows (`FairShares`) together add to a step while others take part in it
  (`StepBound`): prompts are computed in smaller chunks, and the latest running requests beyond the
  bound are left out of the step;
- charges each flow for what is computed, but only once: tokens that a preempted request computes
  again are free, and so are tokens from the prefix cache. An adapter's weights are read in every
  step that it is in, and charged to those that use it: a large rank slows everybody's tokens.

Places in the batch and slots are given in the queue's order, so the same counters share them. While
only one flow has requests, nothing is reordered or limited.

A request that waits for an adapter, a grammar or more input is in nobody's way, and does not limit
anybody's prompts either.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_multilora.adapters.blend import is_blend
from vllm_multilora.integration.engine.requests.tenant_wall import tenant_of
from vllm_multilora.integration.engine.scheduling.fair_queue import adapter_of, queue_of
from vllm_multilora.integration.engine.scheduling.scheduler import COULD_RUN, AdapterAwareMixin
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.slots.fairness.fair_shares import (
    GENERATED_COST,
    PROMPT_COST,
    FairShares,
    Flow,
    cost_of,
    reading_cost,
)
from vllm_multilora.slots.fairness.step_bound import StepBound
from vllm_multilora.states import AT_HAND

if TYPE_CHECKING:
    from vllm.v1.request import Request

BASE_MODEL: Flow = ("base model", "")
"""The flow of all requests that name neither a tenant nor an adapter."""

_MIN_SHARE = 1.5
"""Heavy flows may always have this multiple of the others' token cost, weighted, however long the
step takes. The others' prompts come on top."""

_MAX_UNDER_WAY = 16
"""Steps whose results may be awaited at a time; older ones never had any."""

BLENDS: Flow = ("blends", "")
"""The flow of all requests for blends that name no tenant: there are as many as one likes."""


def flow_of(request: Request) -> Flow:
    """Who a request is charged to: its tenant, else its adapter, else the base model's users."""
    tenant = tenant_of(request)
    if tenant is not None:
        return ("tenant", tenant.tenant)
    lora = request.lora_request
    if lora is None:
        return BASE_MODEL
    return BLENDS if is_blend(lora.lora_path) else ("adapter", lora.lora_name)


def token_bytes(kv_cache_config: Any) -> float:
    """What a token takes of one worker's KV cache."""
    groups = kv_cache_config.kv_cache_groups
    layers = [(group.kv_cache_spec, len(group.layer_names)) for group in groups]
    return sum(count * spec.page_size_bytes / spec.block_size for spec, count in layers)


@dataclass(frozen=True)
class _BoundStep:
    """A step under way whose time says how much heavy flows may have of others.

    Attributes:
        output: The scheduler's.
        began: When it was scheduled, by `time.perf_counter`.
        added: The cost of what heavy flows have of it.
    """

    output: Any
    began: float
    added: float


class FairSharesMixin(AdapterAwareMixin):
    """A scheduler in which flows have equal shares, or shares by their weights."""

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        scheduler_config = vllm_config.scheduler_config
        step_tokens: int = scheduler_config.max_num_batched_tokens
        self._shares = FairShares()
        self._flows: dict[str, Flow] = {}  # by request
        self._computed: dict[str, int] = {}  # by request that was preempted: tokens it had once
        self.waiting = queue_of(self, self._shares, flow_of)
        # Where vLLM alone chooses the pieces of prompts, nothing is limited.
        is_divisible = scheduler_config.enable_chunked_prefill and not getattr(
            self, "need_mamba_block_aligned_split", False
        )
        slowdown = settings_of(vllm_config).fair_slowdown
        self._bound = StepBound(slowdown, step_tokens) if is_divisible else None
        # The cost of what heavy flows may still have of the step; None: as much as there is.
        self._heavy_left: float | None = None
        self._heavy_reads: set[int] = set()  # the adapters of heavy flows in the step
        # What they may have more in the next step: a request that costs more than they may have of
        # one has its turn when enough has been saved.
        self._saved = 0.0
        self._is_saving = False
        # By weight, what the one of the others had that had least when they generated last.
        self._light_had = 0.0
        self._is_spared_in_vain = False  # nothing of theirs could be computed in the last step
        self._under_way: deque[_BoundStep] = deque(maxlen=_MAX_UNDER_WAY)
        self._last_result = 0.0
        # Of all workers, as an adapter's bytes are.
        workers = vllm_config.parallel_config.world_size
        self._token_bytes = workers * token_bytes(self.kv_cache_config)  # type: ignore[attr-defined]
        self._reserve: Callable[[Request, int, int], int] = super()._reserve_prefill_lookahead  # type: ignore[misc]

    def add_request(self, request: Request) -> None:
        if request.request_id in self.requests:
            # One that has ended is nobody's, and may be kept until a connector has sent its blocks.
            if (known := self._flows.get(request.request_id)) is not None:
                self._shares.unhold(known)
        else:
            flow, tenant = flow_of(request), tenant_of(request)
            self._flows[request.request_id] = flow
            self._shares.join(flow, tenant.weight if tenant is not None else 1.0)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        shares = self._shares
        if not shares.is_contended:
            self._heavy_left, self._light_had, self._saved = None, 0.0, 0.0
            output = super().schedule(*args, **kwargs)
            shares.step_alone(output.total_num_scheduled_tokens)
            return output
        began = time.perf_counter()
        self._hold_hidden()
        shares.begin_step(self.waiting.flows)
        flows, ranks = self._flows, shares.ranks()
        # Python's sort keeps the order of those that are equal: within a flow nothing changes.
        self.running.sort(key=lambda request: ranks[flows[request.request_id]])
        self._heavy_left = allowed = self._allowance()
        self._heavy_reads.clear()
        self._is_saving = False
        output = super().schedule(*args, **kwargs)
        if allowed != 0:  # else the step was the others' alone, and what was saved is still
            self._saved = (self._heavy_left or 0.0) if self._is_saving else 0.0
        is_timed = self._charge(output.num_scheduled_tokens)
        if allowed is not None and self._heavy_left is not None and is_timed:
            self._under_way.append(_BoundStep(output, began, allowed - self._heavy_left))
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        now = time.perf_counter()
        for step in self._under_way:
            if step.output is scheduler_output:
                assert self._bound is not None
                # It waited for the one before, where vLLM schedules ahead.
                self._bound.took(now - max(step.began, self._last_result), step.added)
                self._under_way.remove(step)
                break
        self._last_result = now
        return super().update_from_output(scheduler_output, *args, **kwargs)

    def _hold_hidden(self) -> None:
        """Says of flows that nothing of them could run in the last step, looked at or not."""
        loading = self._blocked.unready - self._turns.waiting
        for flow in self.waiting.hidden_flows():
            adapters = self.waiting.adapters_of(flow)
            if adapters <= self._blocked.numbers:  # else it was passed over as a whole
                self._shares.hold(flow, waits_for_slot=not adapters <= loading)

    def _allowance(self) -> float | None:
        """What heavy flows may have of this step; None: whatever there is."""
        weight = self._shares.heavy_weight
        if self._bound is None or not weight:
            return None
        is_full = len(self.running) >= self.max_num_active_reqs  # type: ignore[attr-defined]
        if (is_full or self._is_spared_in_vain) and all(map(self._is_heavy, self.running)):
            return None  # the others wait for a place or memory, which they get the sooner
        allowed = self._bound.next(_MIN_SHARE * weight * self._light_had)
        return allowed + self._saved if allowed else 0.0

    def _charge(self, scheduled: dict[str, int]) -> bool:
        """Charges flows for a step; whether others than heavy flows do nothing but generate."""
        costs: defaultdict[Flow, float] = defaultdict(float)
        with_prompts: set[Flow] = set()
        users: defaultdict[int, list[Flow]] = defaultdict(list)
        requests, flows, computed = self.requests, self._flows, self._computed
        for request_id, tokens in scheduled.items():
            request = requests[request_id]
            if request.lora_request is not None:
                users[request.lora_request.lora_int_id].append(flows[request_id])
            end, prompt = request.num_computed_tokens, request.num_prompt_tokens
            if tokens == 1 and end > prompt and request_id not in computed:  # nearly all
                costs[flows[request_id]] += GENERATED_COST
                continue
            begin = min(end, max(end - tokens, computed.get(request_id, 0)))
            costs[flows[request_id]] += cost_of(prompt, begin, end)
            if end - tokens < prompt:
                with_prompts.add(flows[request_id])
        for adapter, using in users.items():
            if cost := self._reading_cost(adapter):
                for flow in using:
                    costs[flow] += cost / len(using)
        shares, is_timed = self._shares, False
        if shares.heavy_weight:
            light = [flow for flow in costs if not shares.is_heavy(flow)]
            self._is_spared_in_vain = not light
            is_timed = bool(light) and with_prompts.isdisjoint(light)
            if is_timed:
                self._light_had = min(shares.worth(flow, costs[flow]) for flow in light)
        for flow, cost in costs.items():
            shares.charge(flow, cost)
        return is_timed

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        left = self._heavy_left
        if left is not None:
            if left < 1 and self._is_heavy(request):
                self.waiting.pass_over(request, whole_flow=True)
                return False
            if self.adapters is None and self._is_one_more(request):
                return False
        may_run = super()._handle_blocked_waiting_request(request)
        if may_run or not self._shares.is_contended:
            return may_run
        flow = self._flows[request.request_id]
        self._shares.hold(flow, waits_for_slot=self._lacks_slot(request))
        return False

    def _lacks_slot(self, request: Request) -> bool:
        """Whether a request that was just held back lacks nothing but a slot for its adapter."""
        lora, adapters = request.lora_request, self.adapters
        could_run = request.status in COULD_RUN and not self._late_reloads.holds(request)
        if lora is None or adapters is None or not could_run:
            return False
        if adapters.asks_late:
            return lora.lora_int_id in self._turns.waiting
        return adapters.state(lora.lora_int_id) in AT_HAND

    def _slot_order(self) -> Callable[[int], float] | None:
        shares, queue, flows = self._shares, self.waiting, self._flows
        if not shares.is_contended:
            return None
        least: dict[int | None, float] = {}

        def had(adapter: int) -> float:
            """What the one has had that has had least, of those that wait for it, or use it."""
            if not least:  # asked only where somebody has to make room
                for request in reversed(self.running):
                    if request.lora_request is not None:
                        flow = flows[request.request_id]
                        least[request.lora_request.lora_int_id] = shares.served(flow)
                requested = [(flow, queue.adapters_of(flow)) for flow in queue.flows]
                # Those that hold blocks, as sessions with new input do, wait in a queue of vLLM's.
                apart = (r for r in self.kv_holding_waiting if r.status in COULD_RUN)  # type: ignore[attr-defined]
                requested += [(flows[each.request_id], {adapter_of(each)}) for each in apart]
                for flow, adapters in sorted(
                    requested, key=lambda each: shares.served(each[0]), reverse=True
                ):
                    least.update(dict.fromkeys(adapters, shares.served(flow)))
            return least.get(adapter, math.inf)

        return had

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        # vLLM asks this of every request that it has decided to compute so many tokens of.
        left = self._heavy_left
        if left is None or not self._is_heavy(request):
            return self._reserve(request, num_computed_tokens, num_new_tokens)
        cost, least = PROMPT_COST, 1
        if num_computed_tokens >= request.num_tokens - 1:
            # Its next token, with those that are drafted after it or room for them: vLLM's steps
            # are for all of these or none.
            cost, least = GENERATED_COST, num_new_tokens
        elif request.has_encoder_inputs:
            return self._reserve(request, num_computed_tokens, num_new_tokens)
        lora = request.lora_request
        if lora is not None and lora.lora_int_id not in self._heavy_reads:
            left -= self._reading_cost(lora.lora_int_id)
        if left < cost * least:
            self._is_saving = True
            return 0
        num_new_tokens = min(num_new_tokens, int(left / cost))
        num_new_tokens = self._reserve(request, num_computed_tokens, num_new_tokens)
        if num_new_tokens:
            self._heavy_left = left - cost * num_new_tokens
            if lora is not None:
                self._heavy_reads.add(lora.lora_int_id)
        return num_new_tokens

    def _reading_cost(self, adapter: int) -> float:
        """What the adapter's weights cost in a step; nothing where their size is not known here."""
        version = None if self.adapters is None else self.adapters.version(adapter)
        return 0.0 if version is None else reading_cost(version.nbytes, self._token_bytes)

    def _is_one_more(self, request: Request) -> bool:
        """Whether a request would bring an adapter into the batch for which it has no slot.

        vLLM up to 0.32 looks at the adapters of the running requests that are in the step, and
        ends the engine if those that are in a later one are too many. Where adapters are known to
        the scheduler, turns for slots see to it.
        """
        lora = request.lora_request
        running = {r.lora_request.lora_int_id for r in self.running if r.lora_request}
        return lora is not None and len(running | {lora.lora_int_id}) > self._slots

    def _is_heavy(self, request: Request) -> bool:
        return self._shares.is_heavy(self._flows[request.request_id])

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        before = self._computed.get(request.request_id, 0)
        self._computed[request.request_id] = max(before, request.num_computed_tokens)
        return super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)
        flow = self._flows.pop(request.request_id, None)
        if flow is not None:
            self._shares.leave(flow)
        self._computed.pop(request.request_id, None)
        return freed
