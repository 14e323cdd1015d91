"""Who gets a slot, who gives up its own, and what counts as an answer; one situation each."""

import pytest

from tests.slots.situations import Journal, bring, make_slots, run
from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.assignment import MAX_SLOTS

NEW, OLD = 2, 1
"""Versions of an adapter."""

# Slots


def test_a_version_beside_an_adapters_own_takes_over_once_it_is_there() -> None:
    slots = make_slots(2)
    run(slots, [1])
    beside = slots.assign_beside(1, NEW)
    assert beside is not None
    assert slots.contents == (1, 1)
    assert slots.assign(2, 1) is None, "the slot beside is nobody else's"
    assert slots.succeed(1, NEW) is None, "it is being copied"
    assert slots.filled(beside.order)
    assert slots.is_filled(1, OLD)
    assert slots.succeed(1, NEW) == beside.slot == 1
    assert slots.is_filled(1, NEW)
    assert slots.contents == (None, 1)


@pytest.mark.parametrize("reason", ["failed", "cleared"])
def test_a_version_beside_that_is_not_to_be_used_frees_its_slot(reason: str) -> None:
    slots = make_slots(2)
    run(slots, [1])
    beside = slots.assign_beside(1, NEW)
    assert beside is not None
    if reason == "failed":
        assert slots.fill_failed(beside.order) == 1
        assert slots.contents == (1, None)
    else:
        slots.clear(1)
        assert slots.contents == (None, None)
    assert not slots.filled(beside.order)
    assert slots.succeed(1, NEW) is None


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "gdsf"])
def test_an_adapter_of_the_batch_is_no_victim_though_it_is_the_oldest(policy: str) -> None:
    """Two slots hold A, the oldest, and B; the batch {A, C} takes B's."""
    a, b, c = 1, 2, 3
    slots = make_slots(2, policy)
    run(slots, [a], [b], [b, a], [b], [a])
    given = bring(slots, c)
    assert given is not None
    assert given.slot == 1
    assert slots.contents == (a, c)


def test_the_victim_is_the_policys_choice_among_those_without_protection() -> None:
    slots = make_slots(3)
    run(slots, [3], [1], [2], [])
    given = bring(slots, 4)
    assert given is not None
    assert given.slot == 0
    assert slots.contents == (4, 1, 2)


def test_the_slot_of_one_whose_requests_have_ended_is_given_in_the_next_step() -> None:
    journal = Journal()
    slots = make_slots(2, events=journal)
    run(slots, [1, 2])
    slots.begin_step(frozenset({2}))
    assert slots.assign(3, OLD) is not None
    assert slots.slot_of(1) is None
    slots.begin_step(frozenset({2}))
    assert slots.assign(4, OLD) is None  # 3 was assigned in the step before


def test_a_slot_is_not_given_twice() -> None:
    slots = make_slots(2)
    assert slots.assign(1, OLD) is not None
    assert slots.assign(1, OLD) is None
    assert slots.contents == (1, None)


def test_an_adapter_that_has_arrived_waits_a_step_for_its_request() -> None:
    """Though a request for another adapter is asked for before its own."""
    slots = make_slots(1)
    bring(slots, 1)
    slots.running(frozenset())
    assert slots.assign(2, OLD) is None
    assert slots.admit(1, OLD)
    slots.running(frozenset({1}))
    assert slots.assign(2, OLD) is None


def test_an_adapter_that_was_asked_for_on_its_way_waits_a_step_for_its_request() -> None:
    slots = make_slots(1)
    order = slots.assign(1, OLD)
    assert order is not None
    for _ in range(5):
        slots.running(frozenset())
        assert slots.assign(1, OLD) is None
    slots.filled(order.order)
    slots.running(frozenset())
    assert slots.assign(2, OLD) is None


# Answers


def test_an_answer_of_no_rank_is_a_fault_of_the_caller() -> None:
    slots = make_slots(ranks=2)
    order = slots.assign(1, OLD)
    assert order is not None
    with pytest.raises(ValueError, match="rank 2 answered an order and there are 2 ranks"):
        slots.filled(order.order, rank=2)


# Losing slots


def test_weights_that_a_rank_is_without_are_copied_again_and_nobody_elses() -> None:
    slots = make_slots(3, pinned_names=["a"])
    slots.pins.note(1, "a")
    run(slots, [1, 2])
    slots.missing(1)
    assert slots.contents == (None, 2, None)
    assert 1 in slots.pins
    assert not slots.admit(1, OLD)
    order = slots.assign(1, OLD)
    assert order is not None
    slots.missing(1)  # said of a step before the order
    assert slots.filled(order.order)
    assert slots.admit(1, OLD)
    slots.missing(3)  # has no slot


@pytest.mark.parametrize("steps", [0, 1])
def test_nothing_is_kept_for_an_unloaded_adapter(steps: int) -> None:
    slots = make_slots(1)
    bring(slots, 1)
    for _ in range(steps):
        slots.running(frozenset())
    slots.clear(1)
    assert not slots.is_protected(1)


def test_who_was_admitted_before_its_adapter_was_unloaded_keeps_no_version_out() -> None:
    slots = make_slots(1)
    run(slots, [1], [], [])
    assert slots.admit(1, OLD)
    slots.clear(1)
    bring(slots, 1, OLD)
    assert slots.assign(1, NEW) is not None


# Pins


def test_a_pin_assigns_nothing() -> None:
    slots = make_slots(2)
    slots.pins.pin(1)
    assert slots.contents == (None, None)


# Events


def test_events_tell_what_becomes_of_a_slot() -> None:
    journal = Journal()
    slots = make_slots(1, events=journal, ranks=2)
    order = slots.assign(1, OLD)
    assert order is not None
    slots.filled(order.order, rank=0)
    assert journal.take() == ["assigned 1 to 0"]
    slots.filled(order.order, rank=1)
    assert journal.take() == ["filled 0 with 1"]
    slots.running(frozenset())
    slots.running(frozenset())
    slots.assign(2, OLD)
    assert journal.take() == ["left 0: 1", "evicted gpu 1", "assigned 2 to 0"]
    slots.clear(2)
    assert journal.take() == ["left 0: 2"]


# Look-ups


def test_every_look_up_is_one_hit_or_miss_in_each_tier_it_reaches() -> None:
    journal = Journal()
    slots = make_slots(1, events=journal)
    run(slots, [1], [1], [])
    assert journal.look_ups() == ["miss gpu 1", "hit cpu 1"]
    run(slots, [1])
    assert journal.look_ups() == ["hit gpu 1"]
    slots.running(frozenset())
    slots.read_on_demand(2)
    run(slots, [2])
    assert journal.look_ups() == ["miss gpu 2", "miss cpu 2"]
    run(slots, [], [1])
    assert journal.look_ups() == ["miss gpu 1", "hit cpu 1"]


def test_an_adapter_read_for_a_request_is_a_cpu_miss_once() -> None:
    journal = Journal()
    slots = make_slots(1, events=journal)
    slots.read_on_demand(1)
    run(slots, [1], [], [2], [], [1])
    assert [word for word in journal.look_ups() if " cpu " in word] == [
        "miss cpu 1",
        "hit cpu 2",
        "hit cpu 1",
    ]


def test_weights_that_are_copied_again_into_a_running_batch_are_no_look_up() -> None:
    journal = Journal()
    slots = make_slots(1, events=journal)
    run(slots, [1])
    journal.take()
    slots.clear_all()
    run(slots, [1])
    assert journal.look_ups() == []
    run(slots, [], [1])
    assert journal.look_ups() == ["hit gpu 1"]


def test_what_was_noted_of_an_unloaded_adapter_counts_for_nothing() -> None:
    journal = Journal()
    slots = make_slots(1, events=journal)
    slots.read_on_demand(1)
    slots.clear(1)
    run(slots, [1])
    assert journal.look_ups() == ["miss gpu 1", "hit cpu 1"]


# Settings


@pytest.mark.parametrize("slots", [0, -1, 1.5, True, None], ids=repr)
def test_slots_must_be_a_positive_integer(slots: int) -> None:
    with pytest.raises(ConfigError, match="number of slots must be a positive integer"):
        make_slots(slots)


def test_there_are_only_so_many_slots() -> None:
    assert len(make_slots(MAX_SLOTS).contents) == MAX_SLOTS
    with pytest.raises(ConfigError, match=f"at most {MAX_SLOTS}"):
        make_slots(MAX_SLOTS + 1)


def test_ranks_must_be_a_positive_integer() -> None:
    with pytest.raises(ConfigError, match="number of ranks must be a positive integer"):
        make_slots(2, ranks=0)
