"""The queue of waiting requests keeps its order, whatever a step passes over."""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_multilora.integration.engine.scheduling.fair_queue import FairQueue
from vllm_multilora.slots.fairness.fair_shares import FairShares

NO_GRAMMAR = 5
"""Every so manieth request waits for a grammar of its own."""


@dataclass(eq=False)
class Waiting:
    number: int
    adapter: int
    flow: str = "everybody"
    num_tokens: int = 4
    num_computed_tokens: int = 0
    grammar: Future[None] = field(default_factory=Future)

    @property
    def lora_request(self):
        return SimpleNamespace(lora_int_id=self.adapter) if self.adapter else None

    @property
    def arrival_time(self) -> float:
        return float(self.number)

    @property
    def has_grammar(self) -> bool:
        return self.grammar.done() or self.number % NO_GRAMMAR > 0

    def compile(self) -> None:
        if not self.grammar.done():
            self.grammar.set_result(None)


class Scheduler:
    """Examines the queue as vLLM's does.

    Attributes:
        skipped: What vLLM knows to have been examined in vain.
        examined: In the last step.
    """

    def __init__(self, rank=None) -> None:
        self.skipped: set[Waiting] = set()
        self.shares = FairShares()
        self.queue = FairQueue(
            self.shares, lambda request: request.flow, self.skipped, rank, awaited
        )
        self.examined: list[Waiting] = []

    def add(self, *requests: Waiting) -> None:
        for request in requests:
            self.shares.join(request.flow)
            self.queue.add_request(request)

    def step(self, blocked=(), room: int = 10_000, *, passed_flows=()) -> list[Waiting]:
        """What a step takes in, while no request can run with the blocked adapters."""
        queue, taken, again = self.queue, [], deque()
        queue.begin_step()
        self.examined.clear()
        while queue and len(taken) < room:
            request = queue.peek_request()
            self.examined.append(request)
            if request.flow in passed_flows:
                queue.pass_over(request, whole_flow=True)
            elif request.adapter in blocked or lacks_grammar(request):
                queue.pass_over(request)
            else:
                assert queue.pop_request() is request
                self.skipped.discard(request)
                taken.append(request)
                continue
            assert queue.pop_request() is request
            self.skipped.add(request)
            again.appendleft(request)
        queue.prepend_requests(again)
        return taken


def awaited(request: Waiting) -> Future[None] | None:
    asked_of.append(request)
    return None if request.has_grammar else request.grammar


asked_of: list[Waiting] = []


def lacks_grammar(request: Waiting) -> bool:
    return not request.has_grammar


ADAPTERS = st.integers(0, 4)
STEPS = st.lists(
    st.tuples(
        st.lists(ADAPTERS, max_size=5),  # arrivals
        st.sets(st.integers(1, 4)),  # blocked
        st.integers(0, 6),  # room
        st.lists(st.integers(0, 30), max_size=2),  # aborted
        st.lists(st.integers(0, 30), max_size=3),  # whose grammars come
        st.booleans(),  # whether one that was taken is preempted
    ),
    max_size=25,
)


def priority(request: Waiting) -> tuple[int, int]:
    return request.number * 7 % 3, request.number


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, rank=st.sampled_from([None, priority]))
def test_with_one_flow_it_is_vllms_own_queue(steps, rank):
    """But that of those that cannot run with an adapter, or lack a grammar, it shows one."""
    scheduler, line, number = Scheduler(rank), list[Waiting](), 0
    for arrivals, blocked, room, aborted, compiled, preempts in steps:
        for adapter in arrivals:
            number += 1
            line.append(Waiting(number, adapter))
            scheduler.add(line[-1])
            line.sort(key=rank or (lambda request: 0))
        gone = [line[place] for place in aborted if place < len(line)]
        scheduler.queue.remove_requests(gone)
        line = [request for request in line if request not in gone]
        for place in compiled:
            if place < len(line):
                line[place].compile()
        expected, seen = list[Waiting](), set[int]()
        for request in line:
            if len(expected) == room:
                break
            if request.adapter in blocked:
                seen.add(request.adapter)
            elif request.has_grammar:
                expected.append(request)
        assert scheduler.step(blocked, room) == expected
        vain = [
            (each.adapter, lacks_grammar(each))
            for each in scheduler.examined
            if each.adapter in blocked or lacks_grammar(each)
        ]
        assert len(vain) == len(set(vain))
        assert {adapter for adapter, _ in vain if adapter in blocked} == seen
        line = [request for request in line if request not in expected]
        passed = [each for each in line if (each.adapter, lacks_grammar(each)) in vain]
        assert scheduler.skipped.issuperset(passed)
        if preempts and expected:
            line.insert(0, expected[0])
            line.sort(key=rank or (lambda request: 0))
            scheduler.queue.prepend_request(expected[0])
        assert list(scheduler.queue) == line
        assert len(scheduler.queue) == len(line)
    scheduler.queue.begin_step()
    assert bool(scheduler.queue) == bool(line)
    scheduler.queue.remove_requests(line)
    assert not scheduler.queue._lines


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, blocked_flow=st.sampled_from("abc"))
def test_of_each_flow_the_order_is_kept_and_nothing_is_lost(steps, blocked_flow):
    scheduler, there, number = Scheduler(), dict[Waiting, None](), 0
    for arrivals, blocked, room, aborted, compiled, passes in steps:
        for adapter in arrivals:
            number += 1
            request = Waiting(number, adapter, "abc"[number % 3])
            there[request] = None
            scheduler.add(request)
        gone = [request for request in there if request.number in aborted]
        scheduler.queue.remove_requests(gone)
        for request in gone:
            del there[request]
        for request in [each for each in there if each.number in compiled]:
            request.compile()
        passed = {blocked_flow} if passes else set()
        taken = scheduler.step(blocked, room, passed_flows=passed)
        for request in taken:
            del there[request]
        for flow in "abc":
            own = [request.number for request in taken if request.flow == flow]
            assert own == sorted(own)
        could = [r for r in there if r.has_grammar and r.adapter not in blocked]
        assert len(taken) == room or not [r for r in could if r.flow not in passed]
        assert not any(request.flow in passed for request in taken)
        assert set(scheduler.queue) == there.keys()
        assert len(scheduler.queue) == len(there)


def test_one_look_is_enough_for_all_that_wait_for_the_same():
    scheduler = Scheduler()
    scheduler.add(*(Waiting(5 * n + 1, 1 + n % 2, "ab"[n % 3 % 2]) for n in range(3000)))
    assert not scheduler.step(blocked={1, 2})
    assert {(each.flow, each.adapter) for each in scheduler.examined} == {
        (flow, adapter) for flow in "ab" for adapter in (1, 2)
    }
    assert len(scheduler.examined) == 4
    assert len(scheduler.skipped) == 3000
    assert len(scheduler.step(blocked={1})) == 1500


def test_a_request_that_is_aborted_after_a_look_at_it_is_not_shown_again():
    scheduler = Scheduler()
    first, second, third = Waiting(1, 1), Waiting(2, 2), Waiting(3, 1)
    scheduler.add(first, second, third)
    assert scheduler.queue.peek_request() is first
    scheduler.queue.remove_request(first)
    assert scheduler.queue.peek_request() is second
    scheduler.queue.remove_request(second)
    assert scheduler.queue.peek_request() is third


def test_there_is_something_to_examine_though_others_that_were_passed_over_are_aborted():
    scheduler = Scheduler()
    first, second, third = Waiting(1, 1), Waiting(2, 1), Waiting(3, 2)
    scheduler.add(first, second, third)
    queue = scheduler.queue
    queue.begin_step()
    queue.pass_over(first)
    assert queue.pop_request() is first
    queue.prepend_requests([first])
    queue.remove_requests([first, second])
    assert queue
    assert queue.pop_request() is third
    assert not queue
    queue.begin_step()  # of that flow nothing is left
    assert not queue


def test_of_flows_that_have_had_the_same_the_one_that_came_first_is_first():
    scheduler = Scheduler()
    gone, first, last = Waiting(1, 1, "a"), Waiting(2, 1, "b"), Waiting(3, 1, "a")
    scheduler.add(gone, first, last)
    scheduler.queue.remove_request(gone)
    assert scheduler.step() == [first, last]


def test_one_look_is_enough_for_all_that_wait_for_grammars():
    """And those whose grammars have come run, whatever is before them."""
    scheduler = Scheduler()
    waiting = [Waiting(NO_GRAMMAR * n, 1, "ab"[n % 2]) for n in range(1, 3001)]
    other = Waiting(1, 1, "b")
    scheduler.add(*waiting, other)
    assert scheduler.step() == [other]
    assert len(scheduler.examined) == 3
    assert len(scheduler.skipped) == 3000
    for request in waiting[-2:]:
        request.compile()
    asked_of.clear()
    assert set(scheduler.step()) == set(waiting[-2:])
    assert len(scheduler.examined) == 4
    assert len(asked_of) == 4, "which thousands would take longer for than all the rest of a step"
    scheduler.queue.remove_requests(waiting[:-2])
    assert not scheduler.queue._lines


def test_what_a_step_has_passed_over_is_not_shown_in_it_again():
    scheduler = Scheduler()
    only, other = Waiting(1, 1, "a"), Waiting(2, 2, "b")
    scheduler.add(only, other)
    lines = dict(scheduler.queue._lines)
    assert scheduler.step(blocked={1}) == [other]
    assert len(scheduler.queue) == 1
    assert not scheduler.queue
    assert scheduler.queue._lines["a"] is lines["a"], "what is made anew takes the longest"
    scheduler.queue.begin_step()
    assert scheduler.queue.peek_request() is only
    assert not scheduler.queue._emptied


def test_all_requests_of_a_flow_that_is_passed_over_are_known_to_be_skipped():
    scheduler = Scheduler()
    requests = {Waiting(number, number % 3) for number in range(1, 9)}
    others = [Waiting(number, 1, "others") for number in (11, 12)]
    scheduler.add(*requests, *others)
    assert scheduler.step(passed_flows={"everybody"}) == others
    assert len(scheduler.examined) == 3
    assert scheduler.skipped == requests
