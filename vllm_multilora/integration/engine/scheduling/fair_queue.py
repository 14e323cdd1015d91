"""vLLM's queue of waiting requests, with the request of the flow served least at its head.

Each flow's requests are in the order of vLLM's own queue, that of their arrival or their priority,
and with one flow for all of them it is that queue. The first flow is determined anew in each
step, and within a step a request that was taken, and not passed over, counts as computed. So if
several flows have had the same, each of them gets a place, and not one of them all places.

A step examines one request after the other, and puts back what cannot run. Tens of thousands may
wait for the same adapter. When one of them could not run for its sake, the others are passed over.
So are those that wait for something of their own, a grammar say, until it has come. And where
thousands of adapters are waited for, later steps look at those only for which something may have
come.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from concurrent.futures import Future
from itertools import count
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.request_queue import PriorityRequestQueue, RequestQueue
from vllm.v1.request import RequestStatus

from vllm_multilora.slots.fairness.fair_shares import PROMPT_COST, FairShares, Flow

if TYPE_CHECKING:
    from vllm.v1.request import Request

    Subqueue = list[tuple[Any, Request]]
    Key = tuple[int | None, bool]
    """What a lane is for: an adapter, and whether its requests wait for something of their own."""


class _Line:
    """A flow's requests, each with its place in the queue, in subqueues by adapter.

    Those that wait for something of their own have lanes of their own.

    Attributes:
        subqueues: In the order of their places; none is empty.
        hidden: Lanes that are not shown in this step.
        new: By lane that is shown, those beside its first that have come since it was hidden last,
            at least.
    """

    __slots__ = ("_heads", "hidden", "new", "subqueues")

    def __init__(self) -> None:
        self.subqueues: dict[Key, Subqueue] = {}
        self.hidden: set[Key] = set()
        self.new: defaultdict[Key, set[Request]] = defaultdict(set)
        # The first places in the lanes that are shown; None until the step needs them.
        self._heads: list[tuple[Any, Key]] | None = None

    def first(self) -> Request | None:
        """The first request that is shown; None where none is."""
        heads = self._heads
        if heads is None:
            shown = (key for key in self.subqueues if key not in self.hidden)
            heads = self._heads = [(self.subqueues[key][0][0], key) for key in shown]
            heapq.heapify(heads)
        return self.subqueues[heads[0][1]][0][1] if heads else None

    def pop(self, *, hides: bool) -> tuple[Any, Key]:
        """Takes the request that `first` has just returned; hides the rest of its lane, or not."""
        assert self._heads
        key = self._heads[0][1]
        subqueue = self.subqueues[key]
        place, request = subqueue.pop(0)
        if key in self.new:
            self.new[key].discard(request)
        if subqueue and not hides:
            heapq.heapreplace(self._heads, (subqueue[0][0], key))
        else:
            heapq.heappop(self._heads)
        if not subqueue:
            self._drop(key)
        return place, key

    def take_out(self, key: Key, leaves: Callable[[Request], bool]) -> list[tuple[Any, Request]]:
        """Takes requests of a lane out, with their places."""
        subqueue = self.subqueues.get(key, [])
        gone = [each for each in subqueue if leaves(each[1])]
        if gone:
            self.subqueues[key] = [each for each in subqueue if not leaves(each[1])]
            if key in self.new:
                self.new[key].difference_update(request for _, request in gone)
            if not self.subqueues[key]:
                self._drop(key)
            self.changed()
        return gone

    def show(self, kept: Container[int | None]) -> int:
        """Shows lanes again, but not those of these adapters; says how many requests are in them.

        Lanes of those that wait for something of their own are always shown.
        """
        shown = [key for key in self.hidden if key[1] or key[0] not in kept]
        if shown:
            self.hidden.difference_update(shown)
            self.changed()
        return sum(len(self.subqueues.get(key, ())) for key in shown)

    def changed(self) -> None:
        """Something has come, gone, or been hidden or shown."""
        self._heads = None

    def _drop(self, key: Key) -> None:
        """A lane is empty."""
        del self.subqueues[key]
        self.new.pop(key, None)


class FairQueue(RequestQueue):
    """Requests that wait, for a scheduler that examines them one after another.

    Args:
        shares: Say who has had least; where there are several flows, they know the flow of every
            request in the queue.
        flow_of: A request's flow: always the same, also when the request has ended.
        skipped: Those that the scheduler has examined in vain, where it notes that; gets all that
            are passed over.
        rank: A request's place among all others, the least first; None: they are in the order in
            which they come in, at either end.
        awaited: What a request waits for of its own, and cannot run before; None: nothing.
    """

    def __init__(
        self,
        shares: FairShares,
        flow_of: Callable[[Request], Flow],
        skipped: set[Request] | None = None,
        rank: Callable[[Request], Any] | None = None,
        awaited: Callable[[Request], Future[Any] | None] = lambda request: None,
    ) -> None:
        self._shares = shares
        self._flow_of = flow_of
        self._skipped = skipped
        self._rank = rank
        self._awaited = awaited
        self._lines: dict[Flow, _Line] = {}
        self._emptied: dict[Flow, _Line] = {}  # in this step, which puts most requests back
        self._length = 0
        # Places of the requests that came in last, at either end.
        self._front = self._back = 0
        # The flows by what they have had and would have; None until the step needs it.
        self._order: list[tuple[float, float, int, Flow]] | None = None
        self._numbers = count()
        # What was taken in this step, with its place; and a request that others are hidden with.
        self._taken: dict[Request, Any] = {}
        self._passing: tuple[Request, bool] | None = None
        self._with_hidden: set[Flow] = set()
        self._came: deque[Request] = deque()  # who has what it has waited for; from any thread
        self._hidden = 0

    @property
    def flows(self) -> Collection[Flow]:
        """Flows that have requests in the queue."""
        return self._lines.keys()

    def adapters_of(self, flow: Flow) -> set[int | None]:
        """Adapters of a flow's requests, without requests that wait for something of their own."""
        return {adapter for adapter, waits in self._lines[flow].subqueues if not waits}

    def hidden_flows(self) -> list[Flow]:
        """Flows none of whose requests is shown."""
        found = ((flow, self._lines[flow]) for flow in self._with_hidden & self._lines.keys())
        return [flow for flow, line in found if line.subqueues.keys() <= line.hidden]

    def begin_step(self, kept: Container[int | None] = ()) -> None:
        """Another step is being scheduled, in which what waits for `kept` adapters stays hidden."""
        self._order = self._passing = None
        self._taken.clear()
        self._emptied.clear()
        self._with_hidden &= self._lines.keys()
        for flow in list(self._with_hidden):
            self._hidden -= self._lines[flow].show(kept)
            if not self._lines[flow].hidden:
                self._with_hidden.remove(flow)
        came = {self._came.popleft() for _ in range(len(self._came))}
        for flow, adapter in self._owners(came):
            line = self._lines.get(flow)
            for place, request in line.take_out((adapter, True), came.__contains__) if line else ():
                self._length -= 1
                self._put(request, place)

    def pass_over(self, request: Request, *, whole_flow: bool = False) -> None:
        """Shows no more of a flow's requests for an adapter in this step.

        Those that wait for something of their own are apart from the others.

        Args:
            request: One of them, which is being examined, and is about to be taken.
            whole_flow: Whether that is for all adapters.
        """
        self._passing = request, whole_flow

    def add_request(self, request: Request) -> None:
        if (awaited := self._awaited(request)) is not None:
            awaited.add_done_callback(lambda _: self._came.append(request))
        self._back += 1
        self._put(request, self._back if self._rank is None else self._rank(request))

    def prepend_request(self, request: Request) -> None:
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
        flow = self._first()
        line = self._lines[flow]
        request = line.first()
        assert request is not None
        is_passed = self._passing is not None and self._passing[0] is request
        self._taken[request], subqueue = line.pop(hides=is_passed)
        self._length -= 1
        if not line.subqueues:
            self._emptied[flow] = self._lines.pop(flow)
        if is_passed:
            self._with_hidden.add(flow)
            self._hide(line, subqueue)
            if self._passing is not None and self._passing[1]:
                for key in line.subqueues:
                    self._hide(line, key)
                line.changed()
        if self._order:
            had = self._order[0][0]
            heapq.heappop(self._order)
            if (following := line.first()) is not None:
                tokens = 0 if is_passed else request.num_tokens - request.num_computed_tokens
                had += self._shares.worth(flow, PROMPT_COST * tokens)
                self._place(flow, had, following)
        return request

    def remove_request(self, request: Request) -> None:
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        leaving = set(requests)
        for flow, adapter in self._owners(leaving):
            line = self._lines.get(flow)
            if line is None:
                continue
            for key in ((adapter, False), (adapter, True)):
                gone = len(line.take_out(key, leaving.__contains__))
                self._length -= gone
                self._hidden -= gone if key in line.hidden else 0
            if not line.subqueues:
                del self._lines[flow]
        self._order = None

    def __bool__(self) -> bool:
        """Whether there is a request to examine in this step."""
        return self._length > self._hidden

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """All requests, in the order of their places."""
        subqueues = [
            subqueue for line in self._lines.values() for subqueue in line.subqueues.values()
        ]
        return iter([each for _, each in heapq.merge(*subqueues, key=itemgetter(0))])

    def _owners(self, requests: Iterable[Request]) -> set[tuple[Flow, int | None]]:
        """The flows of requests, each with the adapters of its."""
        return {(self._flow_of(each), adapter_of(each)) for each in requests}

    def _put(self, request: Request, place: Any) -> None:
        waits = self._awaited(request) is not None
        flow, key = self._flow_of(request), (adapter_of(request), waits)
        line = self._lines.get(flow)
        if line is None:
            line = self._emptied.pop(flow) if flow in self._emptied else _Line()
            self._lines[flow] = line
            self._order = None
        self._length += 1
        subqueue = line.subqueues.setdefault(key, [])
        if key in line.hidden:
            self._hidden += 1
            if self._skipped is not None:
                self._skipped.add(request)
        else:
            line.changed()
            if subqueue:
                line.new[key].update((request, subqueue[0][1]))
        insort(subqueue, (place, request), key=itemgetter(0))

    def _hide(self, line: _Line, key: Key) -> None:
        if key in line.hidden:
            return
        line.hidden.add(key)
        if subqueue := line.subqueues.get(key):
            self._hidden += len(subqueue)
            if self._skipped is not None:
                self._skipped.update((subqueue[0][1],), line.new.pop(key, ()))

    def _first(self) -> Flow:
        if len(self._lines) == 1:
            return next(iter(self._lines))
        if not self._order:
            self._order = []
            for flow, line in self._lines.items():
                if (request := line.first()) is not None:
                    self._place(flow, self._shares.served(flow), request)
        return self._order[0][-1]

    def _place(self, flow: Flow, had: float, first: Request) -> None:
        assert self._order is not None
        # Among equals the longest waiting comes first, as without shares.
        heapq.heappush(self._order, (had, first.arrival_time, next(self._numbers), flow))


def queue_of(scheduler: Any, shares: FairShares, flow_of: Callable[[Request], Flow]) -> FairQueue:
    """What one of vLLM's schedulers can have for its queue, in the order of that."""
    skipped = getattr(scheduler, "deferred_waiting", None)
    is_ranked = isinstance(scheduler.waiting, PriorityRequestQueue)
    rank = _rank if is_ranked else None
    return FairQueue(shares, flow_of, skipped, rank, awaited_grammar)


def awaited_grammar(request: Request) -> Future[Any] | None:
    """A request's grammar that is still being compiled; None if there is none."""
    if request.status is not RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        return None
    grammar = getattr(request.structured_output_request, "_grammar", None)
    return grammar if isinstance(grammar, Future) and not grammar.done() else None


def _rank(request: Request) -> tuple[int, float, str]:
    """As vLLM compares requests with priorities."""
    return request.priority, request.arrival_time, request.request_id


def adapter_of(request: Request) -> int | None:
    """The number of a request's adapter; None: it has none."""
    return None if request.lora_request is None else request.lora_request.lora_int_id
