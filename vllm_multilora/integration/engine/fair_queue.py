"""vLLM's queue of waiting requests, with the request of the party served least at its head.

Each party's requests are in the order of vLLM's own queue, that of their arrival or their priority,
and with one party for all of them it is that queue. The first party is determined anew in each
step, and within a step a request that was taken counts as computed. So if several parties have had
the same, each of them gets a place, and not one of them all places.

A step examines one request after the other, and puts back what cannot run. Tens of thousands may
wait for the same adapter. When one of them could not run for its sake, the others are passed over.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import count
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.request_queue import PriorityRequestQueue, RequestQueue

from vllm_multilora.slots.fair_shares import PROMPT_COST, FairShares, Party

if TYPE_CHECKING:
    from vllm.v1.request import Request

    Lane = list[tuple[Any, Request]]


class _Line:
    """A party's requests, each with its place in the queue, in lanes by adapter.

    Attributes:
        lanes: In the order of their places; none is empty.
        hidden: Lanes that are not shown in this step.
        new: By lane, the requests that have come since it was hidden last.
    """

    def __init__(self) -> None:
        self.lanes: dict[int | None, Lane] = {}
        self.hidden: set[int | None] = set()
        self.new: defaultdict[int | None, set[Request]] = defaultdict(set)
        # The first places in the lanes that are shown; None until the step needs them.
        self._heads: list[tuple[Any, int | None]] | None = None

    def first(self) -> Request | None:
        """The first request that is shown; None where none is."""
        heads = self._heads
        if heads is None:
            shown = self.lanes.keys() - self.hidden
            heads = self._heads = [(self.lanes[adapter][0][0], adapter) for adapter in shown]
            heapq.heapify(heads)
        return self.lanes[heads[0][1]][0][1] if heads else None

    def pop(self, *, hides: bool) -> Any:
        """Takes the request that `first` has just returned; hides the rest of its lane, or not.

        Returns:
            Its place.
        """
        assert self._heads
        adapter = self._heads[0][1]
        lane = self.lanes[adapter]
        place, request = lane.pop(0)
        self.new[adapter].discard(request)
        if lane and not hides:
            heapq.heapreplace(self._heads, (lane[0][0], adapter))
        else:
            heapq.heappop(self._heads)
        if not lane:
            del self.lanes[adapter], self.new[adapter]
        return place

    def changed(self) -> None:
        """Something has come, gone, or been hidden or shown."""
        self._heads = None


class FairQueue(RequestQueue):
    """Requests that wait, for a scheduler that examines them one after another.

    Args:
        shares: Say who has had least; where there are several parties, they know the party of every
            request in the queue.
        party_of: A request's party: always the same, also when the request has ended.
        skipped: Those that the scheduler has examined in vain, where it notes that; gets all that
            are passed over.
        rank: A request's place among all others, the least first; None: they are in the order in
            which they come in, at either end.
    """

    def __init__(
        self,
        shares: FairShares,
        party_of: Callable[[Request], Party],
        skipped: set[Request] | None = None,
        rank: Callable[[Request], Any] | None = None,
    ) -> None:
        self._shares = shares
        self._party_of = party_of
        self._skipped = skipped
        self._rank = rank
        self._lines: dict[Party, _Line] = {}
        self._length = 0
        # Places of the requests that came in last, at either end.
        self._front = self._back = 0
        # The parties by what they have had and would have; None until the step needs it.
        self._order: list[tuple[float, float, int, Party]] | None = None
        self._numbers = count()
        # What was taken in this step, with its place; and a request that others are hidden with.
        self._taken: dict[Request, Any] = {}
        self._passing: tuple[Request, bool] | None = None
        self._with_hidden: set[Party] = set()
        self._hidden = 0

    @property
    def parties(self) -> Collection[Party]:
        """Those that have requests in the queue."""
        return self._lines.keys()

    def begin_step(self) -> None:
        """Counters have changed: another step is being scheduled."""
        self._order, self._passing, self._hidden = None, None, 0
        self._taken.clear()
        for party in self._with_hidden & self._lines.keys():
            self._lines[party].hidden.clear()
            self._lines[party].changed()
        self._with_hidden.clear()

    def pass_over(self, request: Request, *, whole_party: bool = False) -> None:
        """Shows no more of a party's requests for an adapter in this step.

        Args:
            request: One of them, which is being examined, and is about to be taken.
            whole_party: Whether that is for all adapters.
        """
        self._passing = request, whole_party

    def add_request(self, request: Request) -> None:
        self._back += 1
        self._put(request, self._back if self._rank is None else self._rank(request))

    def prepend_request(self, request: Request) -> None:
        """Puts a request before all others of its party, where they have no rank."""
        self._front -= 1
        self._put(request, self._front if self._rank is None else self._rank(request))

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Puts what this step has taken back to where it was; others as if one after the other."""
        for request in requests:
            place = self._taken.get(request)
            if place is None:
                self.prepend_request(request)
            else:
                self._put(request, place)

    def peek_request(self) -> Request:
        if not self:
            raise IndexError("peek from an empty queue")
        request = self._lines[self._first()].first()
        assert request is not None
        return request

    def pop_request(self) -> Request:
        if not self:
            raise IndexError("pop from an empty queue")
        party = self._first()
        line = self._lines[party]
        request = line.first()
        assert request is not None
        is_passed = self._passing is not None and self._passing[0] is request
        self._taken[request] = line.pop(hides=is_passed)
        self._length -= 1
        if not line.lanes:
            del self._lines[party]
        if is_passed:
            self._with_hidden.add(party)
            self._hide(line, _adapter_of(request))
            if self._passing is not None and self._passing[1]:
                for adapter in line.lanes:
                    self._hide(line, adapter)
                line.changed()
        if self._order:
            had = self._order[0][0]
            heapq.heappop(self._order)
            if (following := line.first()) is not None:
                cost = PROMPT_COST * (request.num_tokens - request.num_computed_tokens)
                self._place(party, had + self._shares.worth(party, cost), following)
        return request

    def remove_request(self, request: Request) -> None:
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Removes those of the requests that are in the queue."""
        leaving = set(requests)
        for party, adapter in {(self._party_of(each), _adapter_of(each)) for each in leaving}:
            line = self._lines.get(party)
            if line is None or (lane := line.lanes.get(adapter)) is None:
                continue
            kept = [each for each in lane if each[1] not in leaving]
            gone = len(lane) - len(kept)
            self._length -= gone
            self._hidden -= gone if adapter in line.hidden else 0
            line.lanes[adapter] = kept
            line.new[adapter] -= leaving
            line.changed()
            if not kept:
                del line.lanes[adapter], line.new[adapter]
            if not line.lanes:
                del self._lines[party]
        self._order = None

    def __bool__(self) -> bool:
        """Whether there is a request to examine in this step."""
        return self._length > self._hidden

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """All requests, in the order of their places."""
        lanes = [lane for line in self._lines.values() for lane in line.lanes.values()]
        return iter([each for _, each in heapq.merge(*lanes, key=itemgetter(0))])

    def _put(self, request: Request, place: Any) -> None:
        party, adapter = self._party_of(request), _adapter_of(request)
        line = self._lines.get(party)
        if line is None:
            line = self._lines[party] = _Line()
            self._order = None
        line.changed()
        self._length += 1
        self._hidden += adapter in line.hidden
        line.new[adapter].add(request)
        insort(line.lanes.setdefault(adapter, []), (place, request), key=itemgetter(0))

    def _hide(self, line: _Line, adapter: int | None) -> None:
        if adapter in line.hidden:
            return
        line.hidden.add(adapter)
        self._hidden += len(line.lanes.get(adapter, ()))
        if self._skipped is not None:
            self._skipped |= line.new.pop(adapter, set())

    def _first(self) -> Party:
        if len(self._lines) == 1:
            return next(iter(self._lines))
        if not self._order:
            self._order = []
            for party, line in self._lines.items():
                if (request := line.first()) is not None:
                    self._place(party, self._shares.served(party), request)
        return self._order[0][-1]

    def _place(self, party: Party, had: float, first: Request) -> None:
        assert self._order is not None
        # Among equals the longest waiting comes first, as without shares.
        heapq.heappush(self._order, (had, first.arrival_time, next(self._numbers), party))


def queue_of(scheduler: Any, shares: FairShares, party_of: Callable[[Request], Party]) -> FairQueue:
    """What one of vLLM's schedulers can have for its queue, in the order of that."""
    skipped = getattr(scheduler, "deferred_waiting", None)
    is_ranked = isinstance(scheduler.waiting, PriorityRequestQueue)
    return FairQueue(shares, party_of, skipped, _rank if is_ranked else None)


def _rank(request: Request) -> tuple[int, float, str]:
    """As vLLM compares requests with priorities."""
    return request.priority, request.arrival_time, request.request_id


def _adapter_of(request: Request) -> int | None:
    return None if request.lora_request is None else request.lora_request.lora_int_id
