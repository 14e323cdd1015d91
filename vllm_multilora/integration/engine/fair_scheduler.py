"""The scheduler's part of fair shares: who is first in a step, and how much of it a prompt takes.

vLLM takes waiting requests in the order in which they came, and computes as much of a prompt in a
step as there is room for: a tenant with many clients and long prompts stands before all others, and
their tokens wait for its prompts. The mixin, over `AdapterAwareMixin`,

- has the request of whoever has had least of the engine at the head of the queue (`FairQueue`), and
  of the running requests as well, so that whoever has had most is preempted first;
- lets *heavy* parties (`FairShares`) have a limited number of prompt tokens in a step, all of them
  together, while others take part in it;
- charges each party for what is computed, a token's first computing only: what a preempted request
  has to compute again is charged once, and what the prefix cache has, never.

Places in the batch and slots are given in the queue's order, so they are shared by the same
counters. Nothing is ordered or limited while one party only has requests.

A request that waits for an adapter to be loaded, a grammar or more input is not in anybody's way;
it holds up nobody's prompts either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_multilora.adapters.blends import is_blend
from vllm_multilora.integration.engine.fair_queue import FairQueue
from vllm_multilora.integration.engine.scheduler import AdapterAwareMixin
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.tenant_of_request import tenant_of
from vllm_multilora.slots.fair_shares import GENERATED_COST, FairShares, Party, cost_of

if TYPE_CHECKING:
    from vllm.v1.request import Request

BASE_MODEL: Party = ("base model", "")
"""The party of all requests that name neither a tenant nor an adapter."""

BLENDS: Party = ("blends", "")
"""The party of all requests for blends that name no tenant: there are as many as one likes."""


def party_of(request: Request) -> Party:
    """Who a request is charged to: its tenant, else its adapter, else the base model's users."""
    tenant = tenant_of(request)
    if tenant is not None:
        return ("tenant", tenant.name)
    lora = request.lora_request
    if lora is None:
        return BASE_MODEL
    return BLENDS if is_blend(lora.lora_path) else ("adapter", lora.lora_name)


class FairSharesMixin(AdapterAwareMixin):
    """A scheduler in which parties have equal shares, or shares by their weights."""

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        scheduler_config = vllm_config.scheduler_config
        step_tokens: int = scheduler_config.max_num_batched_tokens
        self._shares = FairShares()
        self._parties: dict[str, Party] = {}  # by request
        self._computed: dict[str, int] = {}  # by request that was preempted: tokens it had once
        # By adapter: of those that were found waiting for it to get a slot, who has had least.
        self._slot_parties: dict[int, Party] = {}
        self.waiting: FairQueue = FairQueue(self._shares, party_of)
        # Prompts that vLLM can only compute in pieces of its own choice are not limited.
        is_divisible = scheduler_config.enable_chunked_prefill and not getattr(
            self, "need_mamba_block_aligned_split", False
        )
        limit = settings_of(vllm_config).fair_prefill_tokens or max(1, step_tokens // 2)
        self._heavy_limit = limit if is_divisible else None
        # What heavy parties' prompts may still have of the step; None: as much as there is.
        self._heavy_tokens: int | None = None
        self._reserve: Callable[[Request, int, int], int] = super()._reserve_prefill_lookahead  # type: ignore[misc]

    def add_request(self, request: Request) -> None:
        """Takes a request in, or more input for one."""
        if request.request_id in self.requests:
            self._shares.unhold(self._parties[request.request_id])
        else:
            party, tenant = party_of(request), tenant_of(request)
            self._parties[request.request_id] = party
            self._shares.join(party, tenant.weight if tenant is not None else 1.0)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedules a step."""
        shares = self._shares
        self.waiting.begin_step()
        if not shares.is_contended:
            self._heavy_tokens = None
            output = super().schedule(*args, **kwargs)
            shares.step_alone(output.total_num_scheduled_tokens)
            return output
        shares.begin_step()
        self._heavy_tokens = self._heavy_limit if shares.has_heavy else None
        parties = self._parties
        had = shares.counters()
        # Python's sort keeps the order of those that are equal: within a party nothing changes.
        self.running.sort(key=lambda request: had[parties[request.request_id]])
        output = super().schedule(*args, **kwargs)
        self._charge(output.num_scheduled_tokens)
        return output

    def _charge(self, scheduled: dict[str, int]) -> None:
        costs: defaultdict[Party, float] = defaultdict(float)
        requests, parties, computed = self.requests, self._parties, self._computed
        for request_id, tokens in scheduled.items():
            request = requests[request_id]
            end, prompt = request.num_computed_tokens, request.num_prompt_tokens
            if tokens == 1 and end > prompt and request_id not in computed:  # nearly all
                costs[parties[request_id]] += GENERATED_COST
                continue
            begin = min(end, max(end - tokens, computed.get(request_id, 0)))
            costs[parties[request_id]] += cost_of(prompt, begin, end)
        for party, cost in costs.items():
            self._shares.charge(party, cost)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        if self._heavy_tokens == 0 and self._is_heavy(request):
            return False
        if self._adapters is None and self._heavy_tokens is not None and self._is_one_more(request):
            return False
        may_run = super()._handle_blocked_waiting_request(request)
        if may_run or not self._shares.is_contended:
            return may_run
        party, waits_for_slot = self._parties[request.request_id], self._waits_for_slot(request)
        if waits_for_slot and request.lora_request is not None:
            number = request.lora_request.lora_int_id
            known = self._slot_parties.setdefault(number, party)
            if self._shares.served(party) < self._shares.served(known):
                self._slot_parties[number] = party
        self._shares.hold(party, waits_for_slot=waits_for_slot)
        return False

    def _slot_order(self) -> Callable[[int], float] | None:
        waiting, shares = self._slot_parties, self._shares
        if not waiting or not shares.is_contended:
            return None
        running: dict[int, Party] = {}

        def had(adapter: int) -> float:
            # Asked only where somebody has waited for too long.
            if not running:
                for request in self.running:
                    if request.lora_request is not None:
                        party = self._parties[request.request_id]
                        running.setdefault(request.lora_request.lora_int_id, party)
            party = waiting.get(adapter) or running.get(adapter)
            return float("inf") if party is None else shares.served(party)

        return had

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        # vLLM asks this of every request that it has decided to compute so many tokens of.
        left = self._heavy_tokens
        if (
            left is None
            or num_computed_tokens >= request.num_tokens - 1  # its next token
            or request.has_encoder_inputs
            or not self._is_heavy(request)
        ):
            return self._reserve(request, num_computed_tokens, num_new_tokens)
        num_new_tokens = self._reserve(request, num_computed_tokens, min(num_new_tokens, left))
        self._heavy_tokens = left - num_new_tokens
        return num_new_tokens

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
        return self._shares.is_heavy(self._parties[request.request_id])

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        before = self._computed.get(request.request_id, 0)
        self._computed[request.request_id] = max(before, request.num_computed_tokens)
        return super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)
        party = self._parties.pop(request.request_id, None)
        if party is not None:
            self._shares.leave(party)
        self._computed.pop(request.request_id, None)
        if request.lora_request is not None:
            self._slot_parties.pop(request.lora_request.lora_int_id, None)
        return freed
