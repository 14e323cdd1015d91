"""Adapters take turns with the slots: nobody waits for longer than the bound says."""

from dataclasses import dataclass, field
from math import ceil
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_multilora.slots.fairness.slot_turns import SlotTurns

A, B, C, W, X = 1, 2, 3, 9, 10
PATIENCE = 4
MAX_STEPS = 6


@dataclass
class Request:
    adapter: int
    steps: int


@dataclass
class Scheduler:
    """As vLLM's: running requests go on, waiting ones are asked for in the queue's order."""

    turns: SlotTurns
    slots: int
    most_running: int = 1000
    step: int = 0
    queue: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    @property
    def waiting(self) -> list[int]:
        """The adapters that wait for slots, longest first."""
        self.asked = [one for one in self.asked if one in self.turns.waiting]
        return self.asked

    def run_step(self, *arrivals: tuple[int, int]) -> list[int]:
        """Schedules and carries out a step; the adapters of the requests that ran."""
        self.step += 1
        self.queue.extend(Request(*arrival) for arrival in arrivals)
        self.turns.begin_step({request.adapter for request in self.running}, self.slots)
        waiting = []
        for request in self.queue:
            if len(self.running) < self.most_running and self.turns.admit(request.adapter):
                self.running.append(request)
            else:
                waiting.append(request)
                if request.adapter not in self.waiting:
                    self.asked.append(request.adapter)
        self.queue = waiting
        ran = [request.adapter for request in self.running]
        for request in self.running:
            request.steps -= 1
        self.running = [request for request in self.running if request.steps]
        return ran

    def steps_until(self, adapter: int, *arrivals: tuple[int, int]) -> int:
        """The step, counted from now, in which an adapter runs; these arrive in each."""
        for count in range(1, 500):
            if adapter in self.run_step(*arrivals):
                return count
        raise AssertionError(f"adapter {adapter} never ran")


def saturated(slots: int, **options: int) -> Scheduler:
    """Every slot is taken, and each adapter has a request of the most steps in every step."""
    scheduler = Scheduler(SlotTurns(PATIENCE), slots, **options)
    for _ in range(10):
        scheduler.run_step(*flood(slots))
    return scheduler


def flood(slots: int) -> list[tuple[int, int]]:
    return [(adapter, MAX_STEPS) for adapter in range(1, slots + 1)]


def turns_with(adapter: int, *, waiting: int | None = None) -> SlotTurns:
    """One slot, which this adapter has; the other one waits for it."""
    turns = SlotTurns(PATIENCE)
    turns.begin_step((), 1)
    assert turns.admit(adapter)
    assert waiting is None or not turns.admit(waiting)
    return turns


TRAFFIC = st.lists(st.tuples(st.integers(1, 5), st.integers(1, MAX_STEPS)), max_size=4)


@settings(max_examples=100, deadline=None)
@given(
    slots=st.integers(1, 3),
    patience=st.integers(1, 5),
    traffic=st.lists(TRAFFIC, min_size=20, max_size=40),
    order=st.integers(0, 2**32),
)
def test_whoever_asks_every_step_is_served_within_the_bound(
    slots: int, patience: int, traffic: list[list[tuple[int, int]]], order: int
) -> None:
    """In whatever order the scheduler asks, with no slot idle while anybody waits for one."""
    scheduler, numbers = Scheduler(SlotTurns(patience), slots), Random(order)
    bounds: dict[int, int] = {}
    for arrivals in traffic:
        numbers.shuffle(scheduler.queue)
        ran = scheduler.run_step(*arrivals)
        waiting = scheduler.waiting
        assert len(set(ran)) <= slots
        assert len(set(ran)) == slots or not waiting
        bounds = {
            adapter: bounds.get(
                adapter, scheduler.step + patience - 1 + ceil(place / slots) * MAX_STEPS
            )
            for place, adapter in enumerate(waiting, start=1)
        }
        assert all(scheduler.step < bound for bound in bounds.values())


def test_the_bound_is_met_exactly_by_the_worst_case() -> None:
    scheduler = saturated(1)
    kept_waiting = scheduler.steps_until(W, (W, 1), (A, MAX_STEPS)) - 1
    assert kept_waiting == PATIENCE - 1 + MAX_STEPS


def test_slots_are_given_in_the_queues_order_while_there_are_any() -> None:
    scheduler = Scheduler(SlotTurns(PATIENCE), slots=2)
    assert scheduler.run_step((B, 2), (A, 2), (C, 2), (B, 1)) == [B, A, B]
    assert scheduler.waiting == [C]


def test_the_adapter_that_had_its_slot_for_longest_is_closed_after_the_patience() -> None:
    scheduler = Scheduler(SlotTurns(PATIENCE), slots=2)
    scheduler.run_step((B, 100))
    scheduler.run_step((A, 100), (W, 1))
    for _ in range(PATIENCE - 1):
        assert scheduler.run_step((A, 1), (B, 1)) == [B, A, A, B]
    assert scheduler.run_step((A, 1), (B, 1)) == [B, A, A]


def test_nobody_is_closed_for_one_that_has_a_free_slot_waiting() -> None:
    scheduler = Scheduler(SlotTurns(PATIENCE), slots=2)
    scheduler.run_step((B, PATIENCE + 3))
    scheduler.run_step((A, 100), (W, 1))
    assert scheduler.steps_until(W, (A, 1)) == PATIENCE + 2
    assert not scheduler.queue


def test_those_that_wait_are_served_in_the_order_in_which_they_came() -> None:
    scheduler = saturated(1)
    scheduler.run_step((W, 1))
    scheduler.run_step((X, 1))
    scheduler.queue.reverse()
    scheduler.steps_until(W, (A, 1))
    assert scheduler.run_step((W, 1)) == [X]


def test_aborted_waiters_are_forgotten() -> None:
    scheduler = saturated(1)
    scheduler.run_step((W, 1), *flood(1))
    scheduler.queue = [request for request in scheduler.queue if request.adapter != W]
    scheduler.turns.forget(W)
    for _ in range(3 * PATIENCE):
        assert set(scheduler.run_step(*flood(1))) == {A}
    assert scheduler.waiting == []
    # Its next request waits from then on, not from the first one's arrival.
    scheduler.run_step((W, 1), *flood(1))
    scheduler.run_step(*flood(1))
    assert [request.adapter for request in scheduler.queue] == [W]


def test_no_slot_is_kept_for_one_that_was_forgotten() -> None:
    scheduler = Scheduler(SlotTurns(PATIENCE), slots=1)
    scheduler.run_step((A, 2 * PATIENCE), (W, 1), (X, 1))
    for _ in range(2 * PATIENCE - 1):
        scheduler.run_step()
    scheduler.queue = [request for request in scheduler.queue if request.adapter != W]
    scheduler.turns.forget(W)
    assert scheduler.run_step() == [X]


def test_whoever_had_a_slot_longest_gives_it_up_at_once_when_there_is_one_less() -> None:
    """Though nobody is overdue; and once more for one that is."""
    turns = SlotTurns(PATIENCE)
    turns.begin_step((), 3)
    assert turns.admit(A)
    turns.begin_step({A}, 3)
    assert [turns.admit(adapter) for adapter in (B, C, W)] == [True, True, False]
    for _ in range(PATIENCE - 1):
        turns.begin_step({A, B, C}, 2)
        assert [turns.admit(adapter) for adapter in (A, B, C)] == [False, True, True]
    turns.begin_step({A, B, C}, 2)
    assert [turns.admit(adapter) for adapter in (A, B, C)] == [False, False, True]
    assert not turns.admit(X)
    for _ in range(PATIENCE):
        turns.begin_step({A, B, C}, 2)
    assert not turns.admit(W)  # though it and another are overdue now


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("fill_steps", [1, 3, 3 * PATIENCE])
def test_all_are_served_where_a_slot_takes_steps_to_fill(slots: int, fill_steps: int) -> None:
    """Also when all the others are overdue before the first of them could run."""
    turns, waiting, served = SlotTurns(PATIENCE), list(range(20)), []
    filled_at: dict[int, int] = {}
    for step in range(20 * (fill_steps + 1)):
        turns.begin_step((), slots)  # a request runs for one step
        placed = 0
        for adapter in list(waiting):
            if turns.admit(adapter):
                if step >= filled_at.setdefault(adapter, step + fill_steps):
                    waiting.remove(adapter)
                    served.append(adapter)
                else:
                    turns.place(adapter)
                    placed += 1
        assert placed <= slots
    assert served == list(range(20))


def test_a_turn_lasts_until_the_slot_is_filled_and_asked_for_however_seldom_that_is() -> None:
    """A full batch is asked about when a request has ended; by then others are overdue."""
    turns, waiting, filled = SlotTurns(PATIENCE), list(range(3 * PATIENCE)), set[int]()
    for step in range(10 * len(waiting)):
        turns.begin_step((), 1)
        if step % 3:
            continue
        for adapter in list(waiting):
            if turns.admit(adapter):
                if adapter in filled:
                    waiting.remove(adapter)
                else:
                    turns.place(adapter)
                    filled = {adapter}  # by the next time, as it is the only slot
    assert not waiting


def test_no_slot_is_kept_for_long_for_one_that_does_not_come() -> None:
    """Its request was aborted, say, and others of the adapter do not need a slot yet."""
    turns = turns_with(A, waiting=W)
    for _ in range(PATIENCE):
        turns.begin_step({A}, 1)
    turned_away = 0
    turns.begin_step((), 1)
    while not turns.admit(B):
        turned_away += 1
        assert turned_away <= PATIENCE
        turns.begin_step((), 1)
    assert turned_away == PATIENCE
    assert W not in turns.waiting


def test_a_slot_is_kept_while_nobody_else_requests_it_for_one_that_comes_late() -> None:
    turns = turns_with(A, waiting=W)
    for _ in range(3 * PATIENCE):
        turns.begin_step({A}, 1)
    for _ in range(3 * PATIENCE):
        turns.begin_step((), 1)
    assert [turns.admit(adapter) for adapter in (B, W)] == [False, True]


def test_a_slot_is_kept_for_one_that_is_not_looked_at_though_it_waits_in_the_queue() -> None:
    """Requests before it take all places in the batch, and others are before those."""
    turns = turns_with(A, waiting=W)
    for _ in range(PATIENCE):
        turns.begin_step({A}, 1)
    asked: list[int] = []

    def may_come() -> set[int]:
        asked.append(1)
        return {W}

    for _ in range(5 * PATIENCE):
        turns.begin_step((), 1, may_come=may_come)
        assert not turns.admit(B)
    assert turns.admit(W)
    assert len(asked) <= 5  # a look at all requests, each time


def test_it_is_asked_once_for_all_who_may_come() -> None:
    """Very many requests may have to be looked at for that."""
    turns, asked = SlotTurns(PATIENCE), list[int]()
    kept = {W, W + 10, W + 20}

    def may_come() -> set[int]:
        asked.append(1)
        return kept

    turns.begin_step((), 3)
    assert [turns.admit(adapter) for adapter in (A, B, C, *kept)] == [True] * 3 + [False] * 3
    for _ in range(PATIENCE):
        turns.begin_step({A, B, C}, 3)
    for _ in range(PATIENCE):
        turns.begin_step((), 3, may_come=may_come)
        assert not turns.admit(X)
    assert not asked
    turns.begin_step((), 3, may_come=may_come)
    assert len(asked) == 1
    assert all(map(turns.admit, kept))


def test_one_whose_weights_are_fetched_anew_keeps_its_place_in_the_line_but_no_slot() -> None:
    turns, fetched = SlotTurns(PATIENCE), {X}
    turns.begin_step((), 1)
    assert [turns.admit(adapter) for adapter in (A, W)] == [True, False]
    for _ in range(PATIENCE):
        turns.begin_step({A}, 1, at_hand=fetched.__contains__)
    assert turns.admit(A)  # nobody makes room for W
    assert not turns.admit(X)
    for _ in range(PATIENCE):
        turns.begin_step({A}, 1, at_hand=fetched.__contains__)
    turns.begin_step((), 1, at_hand=fetched.__contains__)
    assert [turns.admit(adapter) for adapter in (B, X)] == [False, True]
    turns.begin_step((), 1)
    assert [turns.admit(adapter) for adapter in (B, W)] == [False, True]


@pytest.mark.parametrize("lost", ["its weights", "its patience", "its requests"])
def test_one_on_its_way_into_its_slot_gives_it_up(lost: str) -> None:
    turns = turns_with(W)
    turns.place(W)
    if lost == "its requests":
        turns.forget(W)
    for _ in range(PATIENCE if lost == "its patience" else 0):
        turns.begin_step((), 1)
        assert not turns.admit(B)
    turns.begin_step((), 1, at_hand=lambda adapter: adapter == B or lost != "its weights")
    assert turns.admit(B)


def test_one_whose_slot_takes_long_to_fill_keeps_it_as_long_as_it_comes() -> None:
    turns = SlotTurns(PATIENCE)
    turns.begin_step((), 1)
    for _ in range(5 * PATIENCE):
        assert turns.admit(W)
        turns.place(W)
        assert not turns.admit(B)
        turns.begin_step((), 1)
    assert turns.admit(W)


def test_with_an_order_the_one_with_the_most_of_it_makes_room() -> None:
    """However short it has had its slot."""
    had = {A: 1.0, B: 2.0, W: 0.0}
    turns = SlotTurns(PATIENCE)
    turns.begin_step((), 2)
    assert turns.admit(A)
    turns.begin_step({A}, 2)
    assert [turns.admit(adapter) for adapter in (B, W)] == [True, False]
    for _ in range(PATIENCE):
        turns.begin_step({A, B}, 2, order=had.__getitem__)
    assert [turns.admit(adapter) for adapter in (A, B)] == [True, False]


def test_with_an_order_as_many_make_room_as_are_overdue() -> None:
    had = {A: 2.0, B: 1.0, W: 0.0, X: 0.0}
    turns = SlotTurns(PATIENCE)
    turns.begin_step((), 2)
    assert [turns.admit(adapter) for adapter in (A, B, W)] == [True, True, False]
    for _ in range(PATIENCE):
        turns.begin_step({A, B}, 2, order=had.__getitem__)
        assert not turns.admit(X)
    assert [turns.admit(adapter) for adapter in (A, B)] == [False, True]


def test_with_an_order_nobody_makes_room_for_one_with_more_of_it() -> None:
    had = {A: 1.0, B: 2.0}
    turns = turns_with(A, waiting=B)
    for _ in range(3 * PATIENCE):
        turns.begin_step({A}, 1, order=had.__getitem__)
        assert turns.admit(A)
    had[A] = 2.0
    turns.begin_step({A}, 1, order=had.__getitem__)
    assert not turns.admit(A)
