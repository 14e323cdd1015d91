"""Any sequence of calls: budgets, protection and slots hold, and two ranks decide alike."""

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

from tests.cache.cache_model import CPU, DISK, FAILED, GPU, LOADING, CacheModel
from tests.cache.caches import make_cache
from vllm_multilora.cache import (
    AdapterInUseError,
    AdapterState,
    CacheFullError,
    MissingAdaptersError,
    PinLimitError,
    SlotsExhaustedError,
)

ADAPTERS = st.integers(1, 8)
STEPS = st.sets(ADAPTERS, max_size=4)


class CacheMachine(RuleBasedStateMachine):
    policy = "lru"

    @initialize(
        slots=st.integers(1, 3),
        spare=st.none() | st.integers(0, 3),
        most_bytes=st.none() | st.integers(5, 30),
    )
    def start(self, slots, spare, most_bytes):
        most_adapters = None if spare is None else slots + spare
        self.model = CacheModel(slots, most_adapters, most_bytes)
        self.ranks = [
            make_cache(slots=slots, adapters=most_adapters, size=most_bytes, policy=self.policy)
            for _ in range(2)
        ]

    def call(self, method, *arguments, **options):
        """The call's result on both ranks, which must be the same, errors included."""
        results = []
        for cache in self.ranks:
            try:
                results.append(getattr(cache, method)(*arguments, **options))
            except Exception as error:
                results.append(error)
        first, second = results
        if isinstance(first, Exception):
            assert type(first) is type(second)
            assert str(first) == str(second)
            raise first
        assert first == second
        return first

    def pick(self, data, *states):
        return data.draw(st.sampled_from(self.model.of_state(*states)))

    def has(self, *states):
        return bool(self.model.of_state(*states))

    @rule(adapter_id=ADAPTERS)
    def register(self, adapter_id):
        self.call("register", adapter_id)
        self.model.states.setdefault(adapter_id, DISK)

    @precondition(lambda self: self.has(DISK, FAILED))
    @rule(data=st.data())
    def start_loading(self, data):
        adapter_id = self.pick(data, DISK, FAILED)
        self.call("start_loading", adapter_id)
        self.model.states[adapter_id] = LOADING

    @precondition(lambda self: self.has(LOADING))
    @rule(data=st.data(), size=st.integers(1, 10), evict=st.booleans())
    def finish_loading(self, data, size, evict):
        self.finish(self.pick(data, LOADING), size, evict)

    def finish(self, adapter_id, size, evict):
        try:
            admission = self.call("finish_loading", adapter_id, size, evict=evict)
        except CacheFullError:
            assert evict
            assert not self.model.can_make_room(size)
            self.model.states[adapter_id] = DISK
        else:
            self.model.admit(adapter_id, size, evict, admission)

    @rule(step=st.sets(ADAPTERS, min_size=1, max_size=3), size=st.integers(1, 10))
    def serve(self, step, size):
        """What a server with blocking loads does; most runs would not fill the tiers otherwise."""
        for adapter_id in sorted(step):
            self.register(adapter_id)
        self.protect_step(step)
        for adapter_id in sorted(step - self.model.sizes.keys()):
            if self.model.states[adapter_id] is not LOADING:
                self.call("start_loading", adapter_id)
                self.model.states[adapter_id] = LOADING
            self.finish(adapter_id, size, evict=True)
        self.begin(step & self.model.sizes.keys())

    @precondition(lambda self: self.has(LOADING))
    @rule(data=st.data())
    def fail_loading(self, data):
        adapter_id = self.pick(data, LOADING)
        self.call("fail_loading", adapter_id, "torn")
        self.model.states[adapter_id] = FAILED

    @precondition(lambda self: self.has(CPU, GPU))
    @rule(data=st.data())
    def begin_step(self, data):
        ready = self.model.of_state(CPU, GPU)
        most = self.model.slots + 1
        self.begin(data.draw(st.sets(st.sampled_from(ready), max_size=most)))

    @precondition(lambda self: self.model.states)
    @rule(data=st.data())
    def place_ahead(self, data):
        adapter_id = self.pick(data, *AdapterState)
        self.model.place(adapter_id, self.call("place_ahead", adapter_id))

    @rule(step=STEPS)
    def begin_any_step(self, step):
        self.begin(step)

    def begin(self, step):
        missing = sorted(step - self.model.sizes.keys())
        try:
            activations = self.call("begin_step", step)
        except MissingAdaptersError:
            assert missing
        except SlotsExhaustedError:
            needed = len(step - self.model.slot_of.keys())
            free = self.model.slots - len(self.model.slot_of)
            assert not missing
            assert needed > free + len(self.model.displaceable(step))
        else:
            assert not missing
            self.model.activate(step, activations)

    @rule(step=STEPS)
    def protect_step(self, step):
        known = step & self.model.states.keys()
        assert self.call("protect_step", known) == tuple(sorted(known - self.model.sizes.keys()))
        self.model.step = known

    @rule()
    def end_step(self):
        self.call("end_step")
        self.model.step = set()

    @rule()
    def clear_slots(self):
        self.call("clear_slots")
        self.model.clear_slots()

    @precondition(lambda self: self.model.states)
    @rule(data=st.data())
    def hold(self, data):
        adapter_id = self.pick(data, *AdapterState)
        self.call("hold", adapter_id)
        self.model.holds[adapter_id] = self.model.holds.get(adapter_id, 0) + 1

    @precondition(lambda self: any(self.model.holds.values()))
    @rule(data=st.data())
    def release(self, data):
        held = sorted(i for i, count in self.model.holds.items() if count)
        adapter_id = data.draw(st.sampled_from(held))
        self.call("release", adapter_id)
        self.model.holds[adapter_id] -= 1

    @precondition(lambda self: self.model.states)
    @rule(data=st.data())
    def pin(self, data):
        adapter_id = self.pick(data, *AdapterState)
        try:
            self.call("pin", adapter_id)
        except PinLimitError:
            assert len(self.model.pins) == self.model.slots - 1
            assert adapter_id not in self.model.pins
        else:
            self.model.pins.add(adapter_id)

    @rule(adapter_id=ADAPTERS)
    def unpin(self, adapter_id):
        self.call("unpin", adapter_id)
        self.model.pins.discard(adapter_id)

    @precondition(lambda self: self.model.states)
    @rule(data=st.data())
    def remove(self, data):
        adapter_id = self.pick(data, *AdapterState)
        in_use = adapter_id in self.model.step or self.model.holds.get(adapter_id, 0)
        try:
            slot = self.call("remove", adapter_id)
        except AdapterInUseError:
            assert in_use
        else:
            assert not in_use
            assert slot == self.model.remove(adapter_id)

    @invariant()
    def every_adapter_is_where_the_model_says(self):
        for cache in self.ranks:
            assert {i: cache.state(i) for i in cache.known} == self.model.states
            assert {i: s for i in cache.known if (s := cache.size(i)) is not None} == (
                self.model.sizes
            )
            assert cache.in_step == self.model.step
            assert cache.pinned == self.model.pins

    @invariant()
    def the_budgets_are_kept(self):
        for cache in self.ranks:
            assert cache.cpu_bytes == sum(self.model.sizes.values())
            assert cache.cpu_adapters == tuple(sorted(self.model.sizes))
            if self.model.most_bytes is not None:
                assert cache.cpu_bytes <= self.model.most_bytes
            if self.model.most_adapters is not None:
                assert len(cache.cpu_adapters) <= self.model.most_adapters

    @invariant()
    def slots_and_adapters_in_them_correspond(self):
        for cache in self.ranks:
            filled = {i: slot for slot, i in enumerate(cache.slots) if i is not None}
            assert filled == self.model.slot_of
            assert len(filled) == sum(i is not None for i in cache.slots)
            assert sorted(filled) == self.model.of_state(GPU)
            assert all(cache.slot_of(i) == slot for i, slot in filled.items())


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "gdsf"])
def test_the_cache_keeps_its_promises_in_any_sequence_of_calls(policy):
    machine = type(f"{policy}_machine", (CacheMachine,), {"policy": policy})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
