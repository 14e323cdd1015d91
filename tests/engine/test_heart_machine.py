"""Store, engines and workers in any order of events: no request is lost, none has wrong weights."""

import contextlib

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

from tests.engine.fake_engine import lora
from tests.engine.whole import RANKS, Engine, Files, Store, path_of
from tests.store.loads.registries import PAGE
from vllm_multilora.integration.engine.scheduling import scheduler as scheduler_module
from vllm_multilora.slots.pins import PinLimitError
from vllm_multilora.store.protocol.messages import StoreSettings

ADAPTERS = st.integers(1, 5)
WHICH = st.integers(0, 20)
ENGINE = st.integers(0, 1)
MOSTLY = st.sampled_from([True] * 4 + [False])


class HeartMachine(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(1, 4),
        count=st.sampled_from([None, 2]),
        slots=st.integers(1, 3),
        named=st.booleans(),
    )
    def begin(self, pages, count, slots, named):
        self.settings = StoreSettings(
            budget_bytes=pages * PAGE, budget_adapters=count, timeout_s=20.0
        )
        self.files = Files()
        self.generation = 0
        self.store = Store(self.settings, self.files, 0)
        pinned = ["adapter 1"] if named and slots > 1 else []
        self.engines = [Engine(number, slots, self.files, pinned=pinned) for number in (1, 2)]
        for engine in self.engines:
            engine.link.connect(self.store)

    # Requests and operators

    @rule(which=ENGINE, number=ADAPTERS, inplace=st.sampled_from([False] * 4 + [True]))
    def request(self, which, number, inplace):
        self.engines[which].request(number, inplace=inplace)

    @rule(which=ENGINE, numbers=st.lists(ADAPTERS, min_size=2, max_size=4))
    def serve(self, which, numbers):
        """Requests that everybody has time for."""
        for number in numbers:
            self.request(which, number, False)
        for _ in range(2):
            self.work_and_step(which)

    @rule(which=ENGINE, request=WHICH)
    def abort(self, which, request):
        self.engines[which].abort(request)

    @rule(which=ENGINE, number=ADAPTERS, inplace=st.booleans())
    def register(self, which, number, inplace):
        engine = self.engines[which]
        adapter = lora(number, path=path_of(number), inplace=inplace)
        engine.futures.append(engine.adapters.register(adapter))

    @rule(which=ENGINE, number=ADAPTERS)
    def unload(self, which, number):
        self.engines[which].unload(number)

    @rule(which=ENGINE, number=ADAPTERS)
    def pin(self, which, number):
        with contextlib.suppress(ValueError, PinLimitError):
            self.engines[which].futures.append(self.engines[which].adapters.pin(number))

    @rule(number=ADAPTERS)
    def change_files(self, number):
        self.files.versions[path_of(number)] = self.files.versions.get(path_of(number), 0) + 1

    # Engines and workers

    @rule(which=ENGINE, done=st.integers(0, 2))
    def step(self, which, done):
        self.engines[which].step(done)

    @rule(which=ENGINE, rank=st.integers(0, RANKS - 1), is_good=MOSTLY)
    def work(self, which, rank, is_good):
        self.engines[which].workers.act(rank, is_good)

    @rule(which=ENGINE, is_prompt=st.booleans())
    def change_pace(self, which, is_prompt):
        self.engines[which].workers.is_prompt = is_prompt

    @rule(which=ENGINE)
    def hear(self, which):
        self.engines[which].link.deliver()

    @rule(which=ENGINE)
    def lose_slots(self, which):
        self.engines[which].lose_slots()

    @rule(which=ENGINE)
    def work_and_step(self, which):
        """All that is ready goes on to its end, else few requests run."""
        self.engines[which].link.deliver()
        self.store.settle()
        for _ in range(3):
            self.engines[which].link.deliver()
            self.engines[which].step()
            self.engines[which].workers.act_all()

    # The store

    @precondition(lambda self: self.store.jobs)
    @rule(which=WHICH)
    def read(self, which):
        jobs = sorted(self.store.jobs)
        self.store.step(jobs[which % len(jobs)])

    @precondition(lambda self: self.store.jobs)
    @rule(which=WHICH, crash=st.booleans())
    def break_job(self, which, crash):
        jobs = sorted(self.store.jobs)
        (self.store.gone if crash else self.store.failed)(jobs[which % len(jobs)])

    @precondition(lambda self: self.store.dying)
    @rule(which=WHICH)
    def end_job(self, which):
        dying = sorted(self.store.dying)
        self.store.gone(dying[which % len(dying)])

    @rule(seconds=st.sampled_from([0.05, 3.0, 25.0]))
    def pass_time(self, seconds):
        self.store.now += seconds
        self.store.registry.loads.tick(self.store.now)

    @rule(is_mapped=st.booleans(), is_lucky=MOSTLY)
    def store_dies(self, is_mapped, is_lucky):
        """Workers go on reading what they have mapped."""
        if is_lucky:
            return
        if not is_mapped:
            for engine in self.engines:
                for worker in engine.workers.ranks:
                    worker.last_segment_lost = 1000 * (self.generation + 1)
        self.generation += 1
        self.store = Store(self.settings, self.files, self.generation)
        for engine in self.engines:
            engine.link.connect(self.store)

    # What is always true

    @invariant()
    def all_is_accounted_for(self):
        if not hasattr(self, "store"):
            return
        self.store.check()
        assert self.store.memory.totals().bytes <= self.settings.budget_bytes
        for engine in self.engines:
            engine.check()

    def teardown(self):
        if not hasattr(self, "store"):
            return
        for _ in range(200):
            self.store.registry.loads.tick(self.store.now)
            self.store.settle()
            self.store.now += 1.0
            for engine in self.engines:
                engine.link.deliver()
                engine.step(done=100)
                engine.workers.act_all()
                engine.adapters.poll()
            if not any(engine.scheduler.requests for engine in self.engines) and all(
                future.done() for engine in self.engines for future in engine.futures
            ):
                break
        for engine in self.engines:
            assert not engine.scheduler.requests, "a request that is never served"
            assert all(future.done() for future in engine.futures)
        for _ in range(10):
            for engine in self.engines:
                engine.workers.act_all()
                engine.adapters.poll()
                assert not engine.scheduler.has_requests()
                engine.link.deliver()
            self.store.settle()
        self.all_is_accounted_for()
        for client in self.store.registry.clients.values():
            assert not client.leases, "a lease that nobody needs"
            assert not client.loads


@pytest.fixture(autouse=True)
def no_naps(monkeypatch):
    monkeypatch.setattr(scheduler_module, "_IDLE_S", 0.0)
    monkeypatch.setattr(scheduler_module, "engine_recorder", lambda config: None)


def test_the_heart_keeps_its_promises_in_any_order_of_events():
    run_state_machine_as_test(
        HeartMachine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
