"""Any sequence of calls, with workers that are late or fail, and answers that overtake others."""

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.slots.situations import make_slots
from vllm_multilora.slots.assignment import Assignment
from vllm_multilora.slots.pins import PinLimitError

ADAPTERS = st.integers(1, 6)
RANKS = 2


@dataclass(frozen=True)
class Answer:
    order: Assignment
    rank: int
    is_good: bool


@dataclass
class Worker:
    """One rank: carries orders out one after the other; None wipes all slots."""

    rank: int
    orders: deque[Assignment | None] = field(default_factory=deque)
    memory: dict[int, tuple[int, int]] = field(default_factory=dict)  # by slot

    def act(self, is_good: bool) -> Answer | None:
        order = self.orders.popleft()
        if order is None:
            self.memory.clear()
            return None
        if is_good:
            self.memory[order.slot] = (order.adapter_id, order.pack)
        else:
            self.memory.pop(order.slot, None)  # half of it was written
        return Answer(order, self.rank, is_good)


class AssignmentMachine(RuleBasedStateMachine):
    policy = "lru"

    @initialize(slots=st.integers(1, 4), named=st.booleans())
    def start(self, slots, named):
        names = ["1"] if named and slots > 1 else []
        self.slots = make_slots(slots, self.policy, ranks=RANKS, pinned_names=names)
        self.workers = [Worker(rank) for rank in range(RANKS)]
        self.answers = []
        self.packs = dict.fromkeys(range(1, 7), 0)
        self.running = frozenset()
        self.admitted = set()
        self.pinned = set()
        self.last_order = [None] * slots
        self.copying = {}  # by order: ranks that have not answered

    def adapters_in_slots(self):
        return {i: slot for slot, i in enumerate(self.slots.contents) if i is not None}

    # The scheduler

    @rule(adapter_id=ADAPTERS)
    def request(self, adapter_id):
        pack = self.packs[adapter_id]
        if self.slots.pins.note(adapter_id, str(adapter_id)):
            self.pinned.add(adapter_id)
        if self.slots.admit(adapter_id, pack):
            assert self.slots.is_filled(adapter_id, pack)
            self.admitted.add(adapter_id)
            return
        before = self.adapters_in_slots()
        used = self.running | self.admitted | self.pinned | self.on_the_way()
        order = self.slots.assign(adapter_id, pack)
        if order is None:
            in_slot = self.slots.pack_in(adapter_id)
            is_there = in_slot == pack
            is_used = in_slot is not None and adapter_id in self.running | self.admitted
            assert is_there or is_used or None not in self.slots.contents
            return
        assert order.slot not in {before[i] for i in used & before.keys() if i != adapter_id}
        if adapter_id in before:
            assert order.slot == before[adapter_id]
            assert adapter_id not in self.running | self.admitted
            assert self.adapters_in_slots() == before
        elif free := set(range(len(self.slots.contents))) - set(before.values()):
            assert order.slot == min(free)
            assert self.adapters_in_slots() == before | {adapter_id: order.slot}
        else:
            others = {i: slot for i, slot in before.items() if slot != order.slot}
            assert self.adapters_in_slots() == others | {adapter_id: order.slot}
        self.last_order[order.slot] = order
        self.copying[order.order] = set(range(RANKS))
        for worker in self.workers:
            worker.orders.append(order)

    def on_the_way(self):
        return {
            order.adapter_id
            for order in self.last_order
            if order is not None and self.copying.get(order.order)
        }

    @rule(data=st.data())
    def step(self, data):
        may_run = sorted(self.running | self.admitted)
        batch = data.draw(st.sets(st.sampled_from(may_run))) if may_run else set()
        self.running = frozenset(batch)
        self.admitted.clear()
        self.slots.running(self.running)

    @rule(adapter_id=ADAPTERS)
    def new_version(self, adapter_id):
        self.packs[adapter_id] += 1

    @rule(adapter_id=ADAPTERS)
    def pin(self, adapter_id):
        try:
            self.slots.pins.pin(adapter_id)
        except PinLimitError:
            assert adapter_id not in self.pinned
        else:
            self.pinned.add(adapter_id)
        assert self.slots.pins.places < len(self.slots.contents)

    @rule(adapter_id=ADAPTERS)
    def unload(self, adapter_id):
        slot = self.slots.slot_of(adapter_id)
        self.slots.clear(adapter_id)
        if slot is not None:
            self.last_order[slot] = None
        self.running -= {adapter_id}
        self.slots.running(self.running)
        self.admitted.clear()
        self.pinned.discard(adapter_id)

    @rule()
    def lose_all_weights(self):
        self.slots.clear_all()
        self.last_order = [None] * len(self.slots.contents)
        self.admitted.clear()
        for worker in self.workers:
            worker.orders.append(None)
        assert self.slots.unfilled == self.running

    # The workers

    @precondition(lambda self: any(worker.orders for worker in self.workers))
    @rule(data=st.data(), is_good=st.sampled_from([True, True, True, False]))
    def work(self, data, is_good):
        busy = [worker.rank for worker in self.workers if worker.orders]
        answer = self.workers[data.draw(st.sampled_from(busy))].act(is_good)
        if answer is not None:
            self.answers.append(answer)

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), again=st.booleans())
    def answer(self, data, again):
        answer = self.answers.pop(data.draw(st.integers(0, len(self.answers) - 1)))
        order = answer.order
        is_current = self.last_order[order.slot] == order and bool(self.copying[order.order])
        if not answer.is_good:
            failed = self.slots.fill_failed(order.order)
            assert failed == (order.adapter_id if is_current else None)
            if is_current:
                self.last_order[order.slot] = None
        else:
            if is_current:
                self.copying[order.order].discard(answer.rank)
            is_last = is_current and not self.copying[order.order]
            assert self.slots.filled(order.order, answer.rank) == bool(is_last)
            if again:
                assert not self.slots.filled(order.order, answer.rank)

    @rule(adapter_id=ADAPTERS)
    def serve(self, adapter_id):
        """A request from its arrival into a step, with prompt workers; else few slots fill."""
        self.request(adapter_id)
        for worker in self.workers:
            while worker.orders:
                answer = worker.act(is_good=True)
                if answer is not None:
                    self.answers.append(answer)
        for answer in self.answers:
            is_current = self.last_order[answer.order.slot] == answer.order
            if answer.is_good:
                self.slots.filled(answer.order.order, answer.rank)
                self.copying[answer.order.order].discard(answer.rank)
            elif self.slots.fill_failed(answer.order.order) is not None:
                assert is_current
                self.last_order[answer.order.slot] = None
        self.answers.clear()
        self.request(adapter_id)
        self.running |= self.admitted
        self.admitted.clear()
        self.slots.running(self.running)

    # What is always true

    @invariant()
    def no_adapter_is_in_two_slots_and_every_slot_has_what_was_ordered_last(self):
        if not hasattr(self, "slots"):
            return
        found = self.adapters_in_slots()
        assert len(found) == sum(i is not None for i in self.slots.contents)
        for slot, order in enumerate(self.last_order):
            expected = None if order is None else order.adapter_id
            assert self.slots.contents[slot] == expected
            if order is not None:
                assert self.slots.slot_of(order.adapter_id) == slot
                assert self.slots.pack_in(order.adapter_id) == order.pack

    @invariant()
    def a_filled_slot_holds_the_ordered_weights_on_every_rank(self):
        if not hasattr(self, "slots"):
            return
        for adapter_id, slot in self.adapters_in_slots().items():
            pack = self.slots.pack_in(adapter_id)
            if self.slots.is_filled(adapter_id, pack):
                for worker in self.workers:
                    assert worker.memory[slot] == (adapter_id, pack)
                assert not self.copying[self.last_order[slot].order]

    @invariant()
    def whoever_runs_or_is_on_the_way_is_protected(self):
        if not hasattr(self, "slots"):
            return
        for adapter_id in self.running | self.admitted | self.pinned | self.on_the_way():
            assert self.slots.is_protected(adapter_id)
        assert self.slots.unfilled == {
            i for i in self.running if not self.slots.is_filled(i, self.slots.pack_in(i))
        }


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "gdsf"])
def test_slots_keep_their_promises_in_any_sequence_of_calls(policy):
    machine = type(f"{policy}_machine", (AssignmentMachine,), {"policy": policy})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
