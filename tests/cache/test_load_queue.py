"""The loader's logic without threads and with a clock that the test moves."""

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

from vllm_multilora.cache.load_failures import FailureKind, LoadFailure
from vllm_multilora.cache.load_queue import LoadQueue, LoadReport, LoadState

TIMEOUT_S = 10.0
RETRY_S = 5.0
TORN = LoadFailure(FailureKind.INVALID, "torn")


@pytest.fixture
def queue():
    return LoadQueue(staged_limit=2, timeout_s=TIMEOUT_S, retry_delay_s=RETRY_S)


def start_ids(queue, now=0.0):
    """Starts all that may start."""
    started = []
    while (load := queue.start(now)) is not None:
        started.append(load)
    return [load.adapter_id for load in started], started


def test_loads_start_in_the_order_of_their_first_want(queue):
    for adapter_id in (3, 1, 3, 2, 1):
        queue.want(adapter_id, "request", 0.0)
    assert start_ids(queue)[0] == [3, 1]
    assert queue.state(2, 0.0) is LoadState.QUEUED


def test_a_place_is_free_again_once_taken_failed_or_dropped(queue):
    for adapter_id in (1, 2, 3, 4, 5):
        queue.want(adapter_id, "request", 0.0)
    _, (one, two) = start_ids(queue)
    queue.finish(one, "weights", 1.0)
    assert queue.start(1.0) is None
    assert queue.take(1) == "weights"
    three = queue.start(1.0)
    assert three.adapter_id == 3
    queue.finish(two, TORN, 1.0)
    four = queue.start(1.0)
    assert four.adapter_id == 4
    queue.finish(four, "weights", 1.0)
    queue.drop(4)
    assert queue.start(1.0).adapter_id == 5


def test_a_hurried_load_goes_first_and_needs_no_place(queue):
    for adapter_id in (1, 2, 3, 4):
        queue.want(adapter_id, "request", 0.0)
    start_ids(queue)
    queue.hurry(4, "other", 0.0)
    assert start_ids(queue)[0] == [4]
    assert queue.running == 3


def test_the_newest_want_is_answered_with_the_times_of_its_load(queue):
    queue.want(1, "old", 1.0)
    load = queue.start(4.0)
    queue.want(1, "new", 5.0)
    assert queue.finish(load, "weights", 6.0) == LoadReport("new", None, 3.0, 2.0)


def test_a_wait_is_not_reported_and_does_not_take_a_wants_answer(queue):
    queue.hurry(1, "wait", 0.0)
    assert queue.finish(queue.start(0.0), "weights", 1.0) is None
    queue.want(2, "want", 0.0)
    queue.hurry(2, "wait", 0.0)
    assert queue.finish(queue.start(0.0), "weights", 1.0).request == "want"


def test_a_failure_answers_until_the_retry_delay_is_over(queue):
    queue.want(1, "request", 0.0)
    report = queue.finish(queue.start(0.0), TORN, 2.0)
    assert report.failure == TORN
    assert queue.failure(1, 2.0 + RETRY_S - 0.1) == TORN
    assert queue.state(1, 2.0) is LoadState.FAILED
    assert queue.failure(1, 2.0 + RETRY_S) is None
    assert queue.state(1, 2.0 + RETRY_S) is LoadState.IDLE


def test_a_failure_outlives_drop_but_not_forget(queue):
    queue.want(1, "request", 0.0)
    queue.finish(queue.start(0.0), TORN, 0.0)
    queue.drop(1)
    assert queue.failure(1, 0.0) == TORN
    queue.forget(1)
    assert queue.failure(1, 0.0) is None


def test_a_dropped_load_is_discarded_at_its_end_and_keeps_its_place_until_then(queue):
    queue.want(1, "request", 0.0)
    load = queue.start(0.0)
    queue.drop(1)
    assert queue.state(1, 0.0) is LoadState.IDLE
    assert queue.running == 1
    assert queue.finish(load, "weights", 1.0) is None
    assert queue.take(1) is None
    assert (queue.running, queue.staged) == (0, 0)


def test_a_want_after_a_drop_joins_the_load_that_still_runs(queue):
    queue.want(1, "old", 0.0)
    load = queue.start(0.0)
    queue.drop(1)
    queue.want(1, "new", 0.0)
    assert queue.start(0.0) is None
    assert queue.finish(load, "weights", 1.0).request == "new"
    assert queue.take(1) == "weights"


def test_a_want_after_forget_does_not_get_what_the_old_load_brings(queue):
    queue.want(1, "old", 0.0)
    old = queue.start(0.0)
    queue.forget(1)
    queue.want(1, "new", 0.0)
    new = queue.start(0.0)
    assert queue.finish(old, "old weights", 1.0) is None
    assert queue.take(1) is None
    assert queue.finish(new, "new weights", 1.0).request == "new"
    assert queue.take(1) == "new weights"


def test_a_forgotten_loads_failure_is_not_held_against_the_adapter(queue):
    queue.want(1, "old", 0.0)
    old = queue.start(0.0)
    queue.forget(1)
    queue.finish(old, TORN, 1.0)
    assert queue.failure(1, 1.0) is None


def test_one_who_waited_for_an_older_load_does_not_take_the_newer(queue):
    old = queue.hurry(1, "request", 0.0)
    queue.finish(queue.start(0.0), "old weights", 0.0)
    assert queue.take(1) == "old weights"
    queue.want(1, "request", 0.0)
    queue.finish(queue.start(0.0), "new weights", 0.0)
    queue.take_shared(old)
    assert queue.take(1) == "new weights"


def test_loads_past_their_time_fail_and_make_room(queue):
    queue.want(1, "request", 0.0)
    queue.want(2, "request", 0.0)
    first, second = queue.start(0.0), queue.start(3.0)
    assert queue.next_deadline() == TIMEOUT_S
    assert queue.expire(TIMEOUT_S - 0.1) == []
    ((load, report),) = queue.expire(TIMEOUT_S)
    assert load is first
    assert report.failure.kind is FailureKind.TIMEOUT
    assert "longer than 10 s" in report.failure.message
    assert queue.next_deadline() == TIMEOUT_S + 3.0
    assert (queue.running, first.hanging, second.hanging) == (1, True, False)


def test_an_adapter_whose_load_hangs_fails_until_it_returns(queue):
    queue.want(1, "request", 0.0)
    load = queue.start(0.0)
    queue.expire(TIMEOUT_S)
    long_after = TIMEOUT_S + 100 * RETRY_S
    assert queue.failure(1, long_after).kind is FailureKind.TIMEOUT
    assert queue.finish(load, "late weights", long_after) is None
    assert queue.failure(1, long_after) is None
    assert queue.take(1) is None


def test_only_failures_that_answer_are_kept(queue):
    for adapter_id in range(50):
        now = adapter_id * RETRY_S
        queue.want(adapter_id, "request", now)
        queue.finish(queue.start(now), TORN, now)
    assert list(queue._failures) == [49]


def test_the_whole_queue_can_fail_without_blame(queue):
    for adapter_id in (1, 2, 3, 4):
        queue.want(adapter_id, adapter_id * 10, 0.0)
    start_ids(queue)
    failed = queue.fail_queued(TORN, 1.0)
    assert [(load.adapter_id, report.request) for load, report in failed] == [(3, 30), (4, 40)]
    assert queue.failure(3, 1.0) is None
    assert queue.state(3, 1.0) is LoadState.IDLE
    assert queue.running == 2


ADAPTERS = st.integers(1, 5)
THREADS = 3


class QueueMachine(RuleBasedStateMachine):
    """Any sequence of calls: limits hold, nothing loads twice, every want is answered once."""

    @initialize(limit=st.integers(1, 4))
    def begin(self, limit):
        self.limit = limit
        self.queue = LoadQueue(staged_limit=limit, timeout_s=TIMEOUT_S, retry_delay_s=RETRY_S)
        self.now = 0.0
        self.serial = 0
        self.in_threads = []
        self.order = []  # Queued adapters as they have to start.
        self.current = {}  # The load that answers for each adapter.
        self.due = {}  # The newest unanswered want of each adapter.

    def answered(self, load, report):
        due = self.due.pop(load.adapter_id, None) if self.is_current(load) else None
        assert (None if report is None else report.request) == due

    def is_current(self, load):
        return self.current.get(load.adapter_id) is load

    @rule(adapter_id=ADAPTERS, hurry=st.booleans())
    def want(self, adapter_id, hurry):
        if self.queue.failure(adapter_id, self.now) is not None:
            assert self.queue.state(adapter_id, self.now) is LoadState.FAILED
            return
        self.serial += 1
        ask = self.queue.hurry if hurry else self.queue.want
        load = ask(adapter_id, self.serial, self.now)
        known = self.current.get(adapter_id)
        assert known is None or load is known
        self.current[adapter_id] = load
        if not hurry and load.value is None:
            self.due[adapter_id] = self.serial
        if known is None:
            self.order.append(adapter_id)
        if hurry and adapter_id in self.order:
            self.order.remove(adapter_id)
            self.order.insert(0, adapter_id)

    @precondition(lambda self: len(self.in_threads) < THREADS)
    @rule()
    def start(self):
        load = self.queue.start(self.now)
        if load is None:
            full = self.queue.running + self.queue.staged >= self.limit
            assert not self.order or full
            return
        assert load.adapter_id == self.order.pop(0)
        assert load.urgent or self.queue.running + self.queue.staged <= self.limit
        same = [other for other in self.in_threads if other.adapter_id == load.adapter_id]
        assert not any(self.is_current(other) for other in same)
        self.in_threads.append(load)

    @precondition(lambda self: self.in_threads)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data, fails):
        load = data.draw(st.sampled_from(self.in_threads))
        self.in_threads.remove(load)
        was_hanging = load.hanging
        report = self.queue.finish(load, TORN if fails else f"weights {id(load)}", self.now)
        if was_hanging:
            assert report is None
            return
        self.answered(load, report)
        if self.is_current(load) and self.queue.state(load.adapter_id, self.now) in (
            LoadState.IDLE,
            LoadState.FAILED,
        ):
            del self.current[load.adapter_id]

    @rule(seconds=st.sampled_from([1.0, RETRY_S, TIMEOUT_S]))
    def pass_time(self, seconds):
        self.now += seconds
        for load, report in self.queue.expire(self.now):
            assert self.now - load.started_at >= TIMEOUT_S
            self.answered(load, report)
            if self.is_current(load):
                del self.current[load.adapter_id]

    @rule(adapter_id=ADAPTERS)
    def take(self, adapter_id):
        staged = self.queue.state(adapter_id, self.now) is LoadState.STAGED
        value = self.queue.take(adapter_id)
        assert (value is not None) == staged
        if staged:
            assert value == f"weights {id(self.current.pop(adapter_id))}"

    @rule(adapter_id=ADAPTERS, forget=st.booleans())
    def drop(self, adapter_id, forget):
        (self.queue.forget if forget else self.queue.drop)(adapter_id)
        self.due.pop(adapter_id, None)
        load = self.current.get(adapter_id)
        if load is not None and (forget or load not in self.in_threads):
            del self.current[adapter_id]
        if adapter_id in self.order:
            self.order.remove(adapter_id)
        assert self.queue.take(adapter_id) is None
        if forget:
            assert self.queue.state(adapter_id, self.now) is LoadState.IDLE

    @invariant()
    def counts_are_those_of_the_loads(self):
        in_time = [load for load in self.in_threads if not load.hanging]
        assert self.queue.running == len(in_time)
        assert self.queue.queued == len(self.order)
        states = [self.queue.state(adapter_id, self.now) for adapter_id in range(1, 6)]
        assert self.queue.staged == states.count(LoadState.STAGED)


def test_any_sequence_of_calls_keeps_the_queues_promises():
    run_state_machine_as_test(
        QueueMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
