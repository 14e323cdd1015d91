"""vLLM's queue of waiting requests, with the request of the party served least at its head.

Each party's requests are in the order of their arrival, as in vLLM's own queue. The first party is
determined anew in each step, and within a step a request that was taken counts as computed. So if
several parties have had the same, each of them gets a place, and not one of them all places.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain, count
from typing import TYPE_CHECKING

from vllm.v1.core.sched.request_queue import RequestQueue

from vllm_multilora.slots.fair_shares import PROMPT_COST, FairShares, Party

if TYPE_CHECKING:
    from vllm.v1.request import Request


class FairQueue(RequestQueue):
    """Requests that wait, for a scheduler that examines them one after another.

    Args:
        shares: Say who has had least; they know the party of every request in the queue.
        party_of: A request's party: always the same, also when the request has ended.
    """

    def __init__(self, shares: FairShares, party_of: Callable[[Request], Party]) -> None:
        self._shares = shares
        self._party_of = party_of
        self._queues: dict[Party, deque[Request]] = {}
        self._length = 0
        # The parties by what they have had and would have; None until the step needs it.
        self._order: list[tuple[float, float, int, Party]] | None = None
        self._numbers = count()
        # Parties of which nothing more is shown in this step, and one that will be among them.
        self._passed: set[Party] = set()
        self._passing: Party | None = None

    @property
    def parties(self) -> Collection[Party]:
        """Those that have requests in the queue."""
        return self._queues.keys()

    def begin_step(self) -> None:
        """Counters have changed: another step is being scheduled."""
        self._order, self._passing = None, None
        self._passed.clear()

    def pass_over(self, party: Party) -> None:
        """Shows no more of a party in this step, once its request that is examined was taken.

        There may be very many others of it.
        """
        self._passing = party

    def add_request(self, request: Request) -> None:
        self._queue_of(request).append(request)

    def prepend_request(self, request: Request) -> None:
        """Puts a request before all others of its party."""
        self._queue_of(request).appendleft(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Puts requests before the others of their parties, the last one first, as vLLM's does."""
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> Request:
        if not self:
            raise IndexError("peek from an empty queue")
        return self._queues[self._first()][0]

    def pop_request(self) -> Request:
        if not self:
            raise IndexError("pop from an empty queue")
        party = self._first()
        queue = self._queues[party]
        request = queue.popleft()
        self._length -= 1
        if not queue:
            del self._queues[party]
        if party == self._passing:
            self._passed.add(party)
            self._passing = None
        if self._order:
            had = self._order[0][0]
            heapq.heappop(self._order)
            if queue and party not in self._passed:
                cost = PROMPT_COST * (request.num_tokens - request.num_computed_tokens)
                self._place(party, had + self._shares.worth(party, cost))
        return request

    def remove_request(self, request: Request) -> None:
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Removes those of the requests that are in the queue."""
        leaving = set(requests)
        for party in {self._party_of(request) for request in leaving} & self._queues.keys():
            queue = self._queues[party]
            kept = deque(request for request in queue if request not in leaving)
            self._length += len(kept) - len(queue)
            if kept:
                self._queues[party] = kept
            else:
                del self._queues[party]
        self._order = None

    def __bool__(self) -> bool:
        """Whether there is a request to examine in this step."""
        return self._length > 0 and not (self._passed and self._passed >= self._queues.keys())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """All requests, party by party."""
        return chain.from_iterable(list(self._queues.values()))

    def _queue_of(self, request: Request) -> deque[Request]:
        """The queue that a request is about to be put into."""
        self._length += 1
        party = self._party_of(request)
        queue = self._queues.get(party)
        if queue is None:
            queue = self._queues[party] = deque()
            self._order = None
        return queue

    def _first(self) -> Party:
        if len(self._queues) == 1:
            return next(iter(self._queues))
        if not self._order:
            self._order = []
            for party in self._queues:
                if party not in self._passed:
                    self._place(party, self._shares.served(party))
        return self._order[0][-1]

    def _place(self, party: Party, had: float) -> None:
        assert self._order is not None
        # Among equals the longest waiting comes first, as without shares.
        arrival = self._queues[party][0].arrival_time
        heapq.heappush(self._order, (had, arrival, next(self._numbers), party))
