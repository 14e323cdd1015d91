"""Simulates vLLM's scheduler step by step, for a trace of requests.

In each step, every request that generates gets a token. Then prompts are computed as far as there
is room (chunked prefill): first those that have been started, then waiting ones in the order of
their arrival. A waiting request whose adapter is not in a slot is passed over, as in
`integration/engine/scheduling/scheduler.py`: the adapter is read, waits for its turn and is copied,
and the request may run in the step after that, or in the same one if the step waits for the copy.
The first requests for an adapter reach the scheduler when it has been read, and queue behind what
has come meanwhile: API servers wait until the engine has accepted it. Slots, turns, policies and
host memory are decided by the same classes as in a server.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from itertools import count

from vllm_multilora.slots.assignment import AWAITED_BYTES, COPY_S, SlotAssignment
from vllm_multilora.slots.fairness.slot_turns import SlotTurns
from vllm_multilora.slots.policies.policy_registry import make_policy
from vllm_multilora.toolbox.capacity.calibration import Calibration
from vllm_multilora.toolbox.capacity.served import PlannedServer, Request, Served
from vllm_multilora.toolbox.capacity.simulated_memory import SimulatedMemory
from vllm_multilora.toolbox.capacity.step_cost import RANGED, StepBatch, StepCost, pairs_of

_IDLE_S = 0.001


class Engine:
    """An engine with empty slots and empty host memory.

    Args:
        sizes: Bytes of each adapter, by number.

    Raises:
        PolicyError: There is no such policy.
    """

    def __init__(
        self, server: PlannedServer, calibration: Calibration, sizes: Sequence[int]
    ) -> None:
        policy, self._shape = server.policy, server.shape
        self._slots = SlotAssignment(self._shape.slots, make_policy(policy))
        self._turns = SlotTurns()
        self._memory = SimulatedMemory(
            make_policy(policy), self._shape.budget, sizes, calibration.loads
        )
        self._step_tokens = server.max_num_batched_tokens
        self._costs = calibration
        self._step_cost = StepCost(calibration.step_s)
        self._sizes = sizes
        self._now = 0.0
        self._way_s = calibration.request_s  # outside the engine, of requests that come now
        self._new: dict[int, list[int]] = {}  # requests by adapter that has never been read
        # Those whose adapters the engine has accepted: when they reach the scheduler; a heap.
        self._accepted: list[tuple[float, int]] = []
        self._known: set[int] = set()  # adapters that have been read
        # By adapter: when a request reached the scheduler, as a number, and the request.
        self._waiting: dict[int | None, deque[tuple[int, int]]] = {}
        self._places = count()
        self._prefilling: dict[int, int] = {}  # by request: tokens that were computed
        self._ending: defaultdict[int, list[int]] = defaultdict(list)  # by step
        self._generating = self._context = 0  # requests, and their tokens
        self._adapted_rows = self._adapted_row_bytes = 0  # of those with adapters
        self._running: Counter[int] = Counter()  # adapters by requests
        self._running_set: frozenset[int] = frozenset()
        self._users: Counter[int] = Counter()  # adapters by requests that have come
        self._copies: list[tuple[float, int, int]] = []  # when they end, order, adapter
        self._waits_for_slot = False  # somebody, in this step

    def serve(self, requests: Sequence[Request]) -> Served:
        """Serves requests, in the order of their arrival; once."""
        self._requests = requests
        self._served = Served([0.0] * len(requests))
        coming = 0
        while True:
            while coming < len(requests) and self._reaches(coming) <= self._now:
                self._let_in(self._reaches(coming))
                self._come(coming)
                coming += 1
            self._accept()
            self._let_in(self._now)
            if self._waiting or self._prefilling or self._generating:
                batch, completed = self._schedule()
                if batch is not None:
                    self._compute(batch, completed)
                    continue
            elif coming == len(requests) and not self._new and not self._accepted:
                break
            self._way_s = self._costs.request_s
            comes = self._reaches(coming) if coming < len(requests) else float("inf")
            if self._accepted:
                comes = min(comes, self._accepted[0][0])
            self._idle(max(comes, self._now))
        self._served.end_s = self._now
        self._served.loads = self._memory.loads
        return self._served

    def _reaches(self, number: int) -> float:
        return self._requests[number].arrives_s + self._way_s

    def _idle(self, until: float) -> None:
        """Nothing can be computed before a request comes, a load ends or a copy does."""
        # From now on, and not times of the trace: late in it, those are too coarse for a load.
        waits = [until - self._now, self._memory.next_s]
        if self._copies:
            waits.append(self._copies[0][0] - self._now)
        if self._waits_for_slot:
            waits.append(_IDLE_S)  # as engines that hold requests back look again
        wait = max(0.0, min(waits))
        self._memory.advance(wait, computing=False)
        self._now = min(self._now + wait, until)

    def _come(self, number: int) -> None:
        adapter = self._requests[number].adapter
        if adapter is None or adapter in self._known:
            self._queue(number)
        else:
            self._new.setdefault(adapter, []).append(number)
        if adapter is None:
            return
        self._users[adapter] += 1
        if self._slots.slot_of(adapter) is not None:
            self._served.gpu_hits += 1
            self._served.cpu_hits += 1
        else:
            self._served.cpu_hits += adapter in self._memory
            self._memory.request_load(adapter)

    def _accept(self) -> None:
        """Has requests come whose adapters have been read for the first time.

        That is noticed between two steps, so they reach the scheduler while the next is computed.
        What loads take in an idle engine has their way in it.
        """
        way_s = self._way_s if self._generating or self._prefilling else 0.0
        for adapter in [adapter for adapter in self._new if adapter in self._memory]:
            self._known.add(adapter)
            for number in self._new.pop(adapter):
                heapq.heappush(self._accepted, (self._now + way_s, number))

    def _let_in(self, until: float) -> None:
        while self._accepted and self._accepted[0][0] <= until:
            self._queue(heapq.heappop(self._accepted)[1])

    def _queue(self, number: int) -> None:
        place = next(self._places), number
        self._waiting.setdefault(self._requests[number].adapter, deque()).append(place)

    # A step

    def _schedule(self) -> tuple[StepBatch | None, list[int]]:
        """What the next step computes, None if nothing; the requests whose prompts it completes."""
        self._take_copies()
        self._copies_until = self._now + COPY_S  # the step waits for copies
        self._slots.begin_step(frozenset(self._running))
        self._turns.begin_step(
            self._running, self._shape.slots, None, self._waiting.keys, self._is_at_hand
        )
        self._waits_for_slot = False
        left = self._step_tokens - self._generating
        self._admit(left - sum(self._left_of(number) for number in self._prefilling))
        if self._running_set != self._running.keys():
            self._running_set = frozenset(self._running)
            self._memory.used(self._running_set)
        self._slots.running(self._running_set)
        if not self._prefilling and not self._generating:
            return None, []
        return self._batch(left)

    def _left_of(self, number: int) -> int:
        """Tokens of a request's prompt that are still to be computed."""
        return self._requests[number].prompt_tokens - self._prefilling[number]

    def _take_copies(self) -> None:
        while self._copies and self._copies[0][0] <= self._now:
            _, order, adapter = heapq.heappop(self._copies)
            self._slots.filled(order)
            self._memory.release(adapter)

    def _admit(self, left: int) -> None:
        """Takes waiting requests into the batch, which has room for so many tokens of theirs."""
        room = self._shape.concurrency - self._generating - len(self._prefilling)
        heads = [(queue[0], adapter) for adapter, queue in self._waiting.items()]
        heapq.heapify(heads)
        while heads and room > 0 and left > 0:
            (_, number), adapter = heapq.heappop(heads)
            if adapter is not None and not self._may_run(adapter):
                continue  # and so it is with all that wait for the same
            queue = self._waiting[adapter]
            queue.popleft()
            if queue:
                heapq.heappush(heads, (queue[0], adapter))
            else:
                del self._waiting[adapter]
            self._prefilling[number] = 0
            room -= 1
            left -= self._requests[number].prompt_tokens
            if adapter is not None:
                self._running[adapter] += 1

    def _is_at_hand(self, adapter: int) -> bool:
        return self._slots.slot_of(adapter) is not None or adapter in self._memory

    def _may_run(self, adapter: int) -> bool:
        """Whether a waiting request may join the batch; brings its adapter nearer if not."""
        if not self._is_at_hand(adapter):
            self._memory.request_load(adapter)
            return False
        if not self._turns.admit(adapter):
            self._waits_for_slot = True
            return False
        if self._slots.admit(adapter, adapter):
            return True
        order = self._slots.assign(adapter, adapter)
        if order is None:
            self._waits_for_slot |= self._slots.slot_of(adapter) is None
        else:
            self._served.activations += 1
            loads = self._costs.loads
            assert loads is not None
            seconds = loads.copy_seconds(self._sizes[adapter])
            heapq.heappush(self._copies, (self._now + seconds, order.order, adapter))
            if self._sizes[adapter] <= AWAITED_BYTES:
                waited = min(seconds, self._copies_until - self._now)
                self._memory.advance(waited, computing=False)
                self._now += waited
                self._take_copies()
                if self._slots.admit(adapter, adapter):
                    return True
        self._turns.place(adapter)
        return False

    def _batch(self, left: int) -> tuple[StepBatch, list[int]]:
        """Computes prompts, as many tokens as are left for them."""
        prompt_tokens, pairs = 0, 0.0
        adapted, adapted_bytes = self._adapted_rows, float(self._adapted_row_bytes)
        completed = []
        for number, before in self._prefilling.items():
            adapter = self._requests[number].adapter
            tokens = min(left - prompt_tokens, self._left_of(number))
            prompt_tokens += tokens
            pairs += pairs_of(tokens, before)
            if adapter is not None:
                adapted += tokens
                adapted_bytes += tokens * self._sizes[adapter]
            self._prefilling[number] += tokens
            if not self._left_of(number):
                completed.append(number)
        batch = StepBatch(
            prompt_tokens=prompt_tokens,
            rows=self._generating + len(completed),
            prompt_pairs=pairs,
            context_tokens=self._context + self._generating,
            adapter_bytes=sum(self._sizes[adapter] for adapter in self._running),
            adapted_tokens=adapted,
            adapted_token_bytes=adapted_bytes,
            is_loading=self._memory.is_loading,
        )
        return batch, completed

    def _compute(self, batch: StepBatch, completed: Sequence[int]) -> None:
        seconds, served = self._step_cost.of(batch), self._served
        served.steps.append((seconds, self._generating))
        context = self._context + sum(self._prefilling.values()) + self._generating
        served.most_context = max(served.most_context, context)
        for what in RANGED:
            served.most[what] = max(served.most[what], getattr(batch, what))
        self._now += seconds
        self._way_s = self._costs.request_beside_s
        self._memory.advance(seconds, computing=True)
        self._context += self._generating
        step = len(served.steps)
        for number in self._ending.pop(step, ()):
            self._generates(number, -1)
            self._leave(number)
        for number in completed:
            request = self._requests[number]
            del self._prefilling[number]
            served.first_token_s[number] = self._now - request.arrives_s
            if request.generation_tokens == 1:
                self._leave(number)
            else:
                self._generates(number, 1)
                self._ending[step + request.generation_tokens - 1].append(number)

    def _generates(self, number: int, count: int) -> None:
        """A request begins to generate (1), or has all its tokens (-1)."""
        request = self._requests[number]
        self._generating += count
        # A token is computed when the next one is made: the last never is.
        self._context += (
            request.prompt_tokens
            if count > 0
            else 1 - request.prompt_tokens - request.generation_tokens
        )
        if request.adapter is not None:
            self._adapted_rows += count
            self._adapted_row_bytes += count * self._sizes[request.adapter]

    def _leave(self, number: int) -> None:
        adapter = self._requests[number].adapter
        if adapter is None:
            return
        self._running[adapter] -= 1
        if not self._running[adapter]:
            del self._running[adapter]
        self._users[adapter] -= 1
        if not self._users[adapter]:
            self._turns.forget(adapter)
            self._memory.release(adapter)
