"""The cache's decisions, one situation each."""

import pytest

from tests.cache.caches import MIB, Recorder, load, make_cache, steps
from vllm_multilora.cache import (
    Activation,
    AdapterInUseError,
    AdapterState,
    Admission,
    CacheError,
    CacheFullError,
    CpuBudget,
    MissingAdaptersError,
    PinLimitError,
    SlotsExhaustedError,
    UnknownAdapterError,
)
from vllm_multilora.errors import ConfigError

# Slots


def test_free_slots_are_given_lowest_first_in_ascending_order_of_adapters():
    cache = make_cache(slots=3, loaded=[7, 5, 6])
    assert cache.begin_step([7, 5]) == (Activation(5, 0, None), Activation(7, 1, None))
    assert cache.begin_step([6]) == (Activation(6, 2, None),)
    assert cache.slots == (5, 7, 6)


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "gdsf"])
def test_an_adapter_of_the_batch_is_no_victim_though_it_is_the_oldest(policy):
    """Two slots hold A, the oldest, and B; the batch {A, C} takes B's."""
    a, b, c = 1, 2, 3
    cache = make_cache(slots=2, loaded=[a, b, c], policy=policy)
    steps(cache, [a], [b], [b, a], [b])
    assert cache.begin_step([a, c]) == (Activation(c, 1, displaced=b),)


def test_an_adapter_keeps_its_slot_over_steps_without_it():
    cache = make_cache(slots=2, loaded=[1, 2])
    steps(cache, [1], [2], [])
    assert cache.begin_step([1, 2]) == ()


def test_the_adapter_that_lost_its_slot_keeps_its_host_copy():
    cache = make_cache(slots=1, loaded=[1, 2])
    steps(cache, [1], [2])
    assert cache.state(1) is AdapterState.CPU
    assert cache.cpu_adapters == (1, 2)
    assert cache.cpu_bytes == 2 * MIB


def test_a_step_with_adapters_that_are_not_loaded_changes_nothing():
    cache = make_cache(slots=2, loaded=[1, 2, 3])
    steps(cache, [1, 2])
    cache.register(4)
    cache.register(5)
    cache.start_loading(5)
    with pytest.raises(MissingAdaptersError, match=r"4 \(disk\), 5 \(loading\), 9 \(gone\)") as e:
        cache.begin_step([9, 5, 4, 3])
    assert e.value.adapter_ids == (4, 5, 9)
    assert cache.slots == (1, 2)
    assert cache.in_step == {1, 2}


def test_more_adapters_than_slots_changes_nothing():
    cache = make_cache(slots=2, loaded=[1, 2, 3])
    steps(cache, [1])
    with pytest.raises(SlotsExhaustedError, match="3 adapters for 2 slots; raise --max-loras"):
        cache.begin_step([1, 2, 3])
    assert cache.slots == (1, None)
    assert cache.in_step == {1}


def test_held_and_pinned_adapters_keep_their_slots():
    cache = make_cache(slots=3, loaded=[1, 2, 3, 4, 5])
    steps(cache, [1, 2, 3])
    cache.hold(1)
    cache.pin(2)
    assert cache.begin_step([4]) == (Activation(4, 2, displaced=3),)
    with pytest.raises(
        SlotsExhaustedError, match="needs 1 slots of other adapters and 0 can be given up: 2 adap"
    ):
        cache.begin_step([4, 5])
    cache.release(1)
    assert cache.begin_step([4, 5]) == (Activation(5, 0, displaced=1),)


def test_cleared_slots_are_filled_again_by_the_same_step():
    cache = make_cache(slots=2, loaded=[1, 2])
    steps(cache, [2, 1])
    cache.clear_slots()
    assert cache.slots == (None, None)
    assert cache.state(1) is cache.state(2) is AdapterState.CPU
    assert [activation.adapter_id for activation in cache.begin_step([2, 1])] == [1, 2]


# Host memory


def test_a_slot_is_given_ahead_of_the_step_that_needs_it():
    cache = make_cache(slots=2, loaded=[1, 2, 3])
    steps(cache, [1])
    assert cache.place_ahead(2) == Activation(2, 1, None)
    assert cache.place_ahead(2) is None  # it has one
    assert cache.begin_step([1, 2]) == ()


def test_a_slot_given_ahead_is_nobodys_that_the_current_step_or_a_request_needs():
    cache = make_cache(slots=3, loaded=[1, 2, 3, 4])
    steps(cache, [2, 3], [1])
    cache.hold(2)
    assert cache.place_ahead(4) == Activation(4, 1, displaced=3)
    cache.hold(4)
    assert cache.place_ahead(3) is None
    assert cache.slots == (2, 4, 1)


def test_a_slot_given_ahead_goes_to_a_step_that_needs_it_more():
    cache = make_cache(slots=2, loaded=[1, 2, 3])
    steps(cache, [1])
    cache.place_ahead(2)
    assert cache.begin_step([1, 3]) == (Activation(3, 1, displaced=2),)


def test_nothing_is_placed_that_is_not_in_host_memory():
    cache = make_cache(slots=2)
    cache.register(1)
    assert cache.place_ahead(1) is None
    assert cache.place_ahead(9) is None


def test_registration_takes_free_room_only():
    cache = make_cache(slots=1, adapters=2, loaded=[1])
    assert load(cache, 2, evict=False) == Admission(admitted=True)
    assert load(cache, 3, evict=False) == Admission(admitted=False)
    assert cache.state(3) is AdapterState.DISK
    assert cache.cpu_adapters == (1, 2)


def test_a_request_evicts_in_the_order_of_use():
    cache = make_cache(slots=1, adapters=3, loaded=[1, 2, 3])
    steps(cache, [2], [1], [3])
    assert load(cache, 4) == Admission(admitted=True, evicted=(2,))
    assert cache.state(2) is AdapterState.DISK


def test_adapters_without_a_slot_go_before_older_ones_in_slots():
    cache = make_cache(slots=2, adapters=3, loaded=[1, 2])
    steps(cache, [1], [2], [])
    load(cache, 3)
    assert load(cache, 4).evicted == (3,)
    assert load(cache, 5).evicted == (4,)
    assert cache.slots == (1, 2)


def test_adapters_in_slots_go_if_nothing_else_is_enough_and_leave_their_slots():
    cache = make_cache(slots=2, size=4 * MIB, loaded=[1, 2, 3])
    steps(cache, [2], [1])
    cache.end_step()
    assert load(cache, 4, size=3 * MIB).evicted == (3, 2)
    assert cache.slots == (None, 1)
    assert cache.cpu_bytes == 4 * MIB


def test_victims_for_bytes_are_as_many_as_needed():
    cache = make_cache(slots=1, size=5 * MIB, loaded=[1, 2, 3, 4, 5])
    assert load(cache, 6, size=2 * MIB).evicted == (1, 2)
    assert load(cache, 7, size=1 * MIB).evicted == (3,)


def test_the_adapters_of_an_announced_step_are_not_evicted_by_its_own_loads():
    cache = make_cache(slots=2, adapters=2, loaded=[1, 2])
    cache.register(3)
    assert cache.protect_step([3, 1]) == (3,)
    assert load(cache, 3).evicted == (2,)
    assert [activation.adapter_id for activation in cache.begin_step([3, 1])] == [1, 3]


def test_announcing_an_unknown_adapter_changes_nothing():
    cache = make_cache(loaded=[1])
    steps(cache, [1])
    with pytest.raises(UnknownAdapterError, match="adapter 2 is not registered"):
        cache.protect_step([1, 2])
    assert cache.in_step == {1}


def test_without_enough_victims_nothing_is_evicted_and_the_error_says_who_holds_the_room():
    cache = make_cache(slots=2, size=4 * MIB, loaded=[1, 2, 3, 4])
    steps(cache, [1])
    cache.hold(2)
    cache.pin(3)
    with pytest.raises(
        CacheFullError,
        match=r"no room in host memory for adapter 5 \(2.0 MiB\) within the budget \(4.0 MiB\): 3 "
        r"adapters with 3.0 MiB are in use \(1 in the current step, 1 held by requests in flight, "
        r"1 pinned\); raise --max-cpu-loras or --multilora-cpu-cache-gib, or unpin",
    ):
        load(cache, 5, size=2 * MIB)
    assert cache.state(5) is AdapterState.DISK
    assert cache.cpu_adapters == (1, 2, 3, 4)


def test_an_adapter_larger_than_the_budget_is_called_that():
    cache = make_cache(slots=1, size=4 * MIB, loaded=[1])
    with pytest.raises(CacheFullError, match="it alone is larger than the budget"):
        load(cache, 2, size=5 * MIB)
    assert load(cache, 2, size=5 * MIB, evict=False) == Admission(admitted=False)
    assert cache.cpu_adapters == (1,)


def test_after_the_step_its_adapters_may_be_evicted():
    cache = make_cache(slots=1, adapters=1, loaded=[1])
    steps(cache, [1])
    with pytest.raises(CacheFullError):
        load(cache, 2)
    cache.end_step()
    assert load(cache, 2).evicted == (1,)
    assert cache.slots == (None,)


# Holds, pins, removal


def test_holds_are_counted():
    cache = make_cache(slots=1, adapters=1, loaded=[1])
    cache.hold(1)
    cache.hold(1)
    cache.release(1)
    with pytest.raises(CacheFullError):
        load(cache, 2)
    cache.release(1)
    assert load(cache, 2).evicted == (1,)
    with pytest.raises(CacheError, match="adapter 1 is released more often than it was held"):
        cache.release(1)


def test_one_slot_stays_without_pin():
    cache = make_cache(slots=3, loaded=[1, 2, 3])
    cache.pin(2)
    cache.pin(1)
    cache.pin(1)
    with pytest.raises(
        PinLimitError, match=r"with 3 slots at most 2 adapters can be, .*\(pinned: 1, 2\); unpin"
    ):
        cache.pin(3)
    cache.unpin(2)
    cache.pin(3)
    assert cache.pinned == {1, 3}


def test_with_one_slot_nothing_can_be_pinned():
    cache = make_cache(slots=1, loaded=[1])
    with pytest.raises(PinLimitError, match=r"at most 0 adapters .*\(pinned: none\)"):
        cache.pin(1)


def test_a_pin_loads_and_activates_nothing():
    cache = make_cache(slots=2)
    cache.register(1)
    cache.pin(1)
    assert cache.state(1) is AdapterState.DISK
    assert cache.slots == (None, None)


def test_what_a_step_or_a_request_uses_is_not_removed():
    cache = make_cache(slots=2, loaded=[1, 2])
    steps(cache, [1])
    cache.hold(2)
    with pytest.raises(AdapterInUseError, match="adapter 1 cannot be removed: the current step"):
        cache.remove(1)
    with pytest.raises(AdapterInUseError, match="adapter 2 cannot be removed: 1 requests in fli"):
        cache.remove(2)
    steps(cache, [])
    cache.release(2)
    assert cache.remove(1) == 0
    assert cache.remove(2) is None
    assert cache.slots == (None, None)
    assert cache.known == ()


def test_a_removed_adapter_takes_its_pin_along():
    cache = make_cache(slots=2, loaded=[1, 2])
    cache.pin(1)
    cache.remove(1)
    cache.pin(2)
    assert cache.pinned == {2}


@pytest.mark.parametrize("call", ["hold", "pin", "remove"])
def test_an_unknown_adapter_is_refused(call):
    with pytest.raises(UnknownAdapterError, match="adapter 1 is not registered"):
        getattr(make_cache(), call)(1)


# Events


def test_every_look_up_is_one_hit_or_miss_in_each_tier_it_reaches():
    recorder = Recorder()
    cache = make_cache(slots=1, adapters=2, events=recorder)
    load(cache, 1, size=10, evict=False)
    assert recorder.take() == ["loaded 1 of 10"]

    steps(cache, [1], [1], [])
    assert recorder.take() == ["miss gpu 1", "hit cpu 1", "activated 1 in 0 of 10"]

    steps(cache, [1])
    assert recorder.take() == ["hit gpu 1"]

    load(cache, 2, size=20)
    steps(cache, [2])
    assert recorder.take() == [
        "loaded 2 of 20",
        "miss gpu 2",
        "miss cpu 2",
        "evicted gpu 1",
        "activated 2 in 0 of 20",
    ]

    load(cache, 3, size=30)
    assert recorder.take() == ["evicted cpu 1", "loaded 3 of 30"]


def test_an_adapter_loaded_for_a_request_is_a_cpu_miss_once():
    recorder = Recorder()
    cache = make_cache(slots=1, adapters=2, loaded=[1, 2], events=recorder)
    steps(cache, [1], [2], [1])
    assert [word for word in recorder.take() if " cpu " in word] == [
        "miss cpu 1",
        "miss cpu 2",
        "hit cpu 1",
    ]


def test_a_look_up_ahead_of_a_step_is_the_steps_look_up():
    events = Recorder()
    cache = make_cache(slots=1, loaded=[1], events=events)
    events.take()
    cache.place_ahead(1)
    assert events.take() == ["miss gpu 1", "miss cpu 1", f"activated 1 in 0 of {MIB}"]
    steps(cache, [1])
    assert events.take() == []
    steps(cache, [], [1])
    assert events.take() == ["hit gpu 1"]


def test_a_look_up_ahead_counts_for_nothing_once_the_slot_is_lost():
    events = Recorder()
    cache = make_cache(slots=1, loaded=[1, 2], events=events)
    cache.place_ahead(1)
    steps(cache, [2], [])
    events.take()
    cache.place_ahead(1)
    cache.clear_slots()
    events.take()
    steps(cache, [1])
    assert events.take()[:2] == ["miss gpu 1", "hit cpu 1"]


def test_a_load_for_a_request_that_never_ran_is_no_later_miss():
    recorder = Recorder()
    cache = make_cache(slots=1, loaded=[1], events=recorder)
    cache.remove(1)
    load(cache, 1, evict=False)
    steps(cache, [1])
    assert "hit cpu 1" in recorder.take()


def test_evicting_an_adapter_in_a_slot_is_told_for_both_tiers():
    recorder = Recorder()
    cache = make_cache(slots=1, adapters=1, loaded=[1], events=recorder)
    steps(cache, [1], [])
    recorder.take()
    load(cache, 2)
    assert recorder.take() == ["evicted gpu 1", "evicted cpu 1", f"loaded 2 of {MIB}"]


def test_unloading_and_lost_weights_are_no_evictions():
    recorder = Recorder()
    cache = make_cache(slots=1, loaded=[1], events=recorder)
    steps(cache, [1], [])
    recorder.take()
    cache.clear_slots()
    cache.remove(1)
    assert recorder.take() == []


def test_a_failed_load_is_told_with_its_reason():
    recorder = Recorder()
    cache = make_cache(events=recorder)
    cache.register(1)
    cache.start_loading(1)
    cache.fail_loading(1, "no such file")
    assert recorder.take() == ["failed 1: no such file"]


# Settings


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "8"], ids=repr)
@pytest.mark.parametrize("name", ["adapters", "bytes"])
def test_a_limit_must_be_a_positive_integer(name, limit):
    with pytest.raises(ConfigError, match=f"budget in {name} must be a positive integer or None"):
        CpuBudget(**{name: limit})


@pytest.mark.parametrize("slots", [0, -1, 1.5, True, None], ids=repr)
def test_slots_must_be_a_positive_integer(slots):
    with pytest.raises(ConfigError, match="number of slots must be a positive integer"):
        make_cache(slots=slots)


def test_the_cpu_tier_must_hold_the_adapters_of_all_slots():
    with pytest.raises(ConfigError, match="3 adapters are fewer than 4 slots; raise --max-cpu-lor"):
        make_cache(slots=4, adapters=3)


def test_a_load_must_have_a_size():
    cache = make_cache()
    with pytest.raises(ValueError, match="size of adapter 1 must be positive, got 0"):
        load(cache, 1, size=0)
