"""The background loader with real threads."""

import gc
import random
import threading
import time
import weakref
from contextlib import contextmanager

import pytest

from tests.cache.gated_loads import PATIENCE_S, Gate, Told, eventually
from vllm_multilora.cache.load_failures import (
    FailureKind,
    LoadDroppedError,
    LoaderClosedError,
    LoadFailedError,
)
from vllm_multilora.cache.load_queue import LoadState
from vllm_multilora.cache.loader import BackgroundLoader, LoaderCounts

HANG_S = 0.2
"""When a load is given up; long enough for one that does not hang, on a busy machine."""


@contextmanager
def make_loader(gate, told, **options):
    settings = {
        "threads": 2,
        "staged_limit": 8,
        "timeout_s": PATIENCE_S,
        "retry_delay_s": PATIENCE_S,
    }
    loader = BackgroundLoader(gate.load, on_done=told, **(settings | options))
    try:
        yield loader
    finally:
        gate.open_all()
        assert loader.close(PATIENCE_S)


@contextmanager
def waiting(loader, adapter_id, **options):
    """A thread that waits for an adapter; its outcome is in the list once the block is left."""
    outcome = []

    def wait():
        try:
            outcome.append(loader.wait(adapter_id, adapter_id, timeout_s=PATIENCE_S, **options))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield outcome
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("multilora-load-")]


def test_a_wanted_adapter_is_loaded_told_of_and_taken_once():
    gate, told = Gate(), Told()
    with make_loader(gate, told) as loader:
        assert loader.want(1, 1) in (LoadState.QUEUED, LoadState.LOADING, LoadState.STAGED)
        ((adapter_id, report),) = told.wait()
        assert (adapter_id, report.request, report.failure) == (1, 1, None)
        assert report.queued_s >= 0
        assert report.load_s >= 0
        assert loader.state(1) is LoadState.STAGED
        assert loader.take(1) == "weights 1"
        assert loader.take(1) is None
        assert loader.state(1) is LoadState.IDLE


def test_wants_of_one_adapter_share_one_load_and_one_answer():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told) as loader:
        for _ in range(5):
            loader.want(1, 1)
        gate.wait_started(1)
        loader.want(1, 1)
        gate.open(1)
        told.wait()
        assert loader.close(PATIENCE_S)
    assert gate.started == [1]
    assert len(told.entries) == 1


def test_a_want_of_a_staged_adapter_is_answered_at_once_without_a_load():
    gate, told = Gate(), Told()
    with make_loader(gate, told) as loader:
        loader.want(1, 1)
        told.wait()
        assert loader.want(1, "newer") is LoadState.STAGED
        assert told.wait(2)[1][1].request == "newer"
        assert gate.started == [1]


def test_no_more_loads_at_a_time_than_threads_and_in_the_order_of_wants():
    adapters = range(1, 7)
    gate, told = Gate(closed=adapters), Told()
    with make_loader(gate, told, threads=2) as loader:
        for adapter_id in adapters:
            loader.want(adapter_id, adapter_id)
        gate.wait_started(2)
        assert loader.counts() == LoaderCounts(queued=4, loading=2, staged=0, hanging=0)
        for adapter_id in adapters:
            gate.open(adapter_id)
            told.wait(adapter_id)
        assert gate.most_at_once == 2
        assert sorted(gate.started[:2]) == [1, 2]
        assert gate.started[2:] == [3, 4, 5, 6]


def test_no_more_adapters_are_loaded_than_may_be_staged_until_one_is_taken():
    gate, told = Gate(), Told()
    with make_loader(gate, told, staged_limit=2) as loader:
        for adapter_id in (1, 2, 3, 4):
            loader.want(adapter_id, adapter_id)
        told.wait(2)
        time.sleep(0.02)
        assert sorted(gate.started) == [1, 2]
        loader.take(1)
        told.wait(3)
        loader.drop(2)
        told.wait(4)
        assert sorted(gate.started) == [1, 2, 3, 4]
        assert loader.counts() == LoaderCounts(queued=0, loading=0, staged=2, hanging=0)


def test_answers_come_one_at_a_time_and_in_order_of_completion():
    adapters = list(range(1, 9))
    gate = Gate(closed=adapters)
    inside, order = [], []

    def on_done(adapter_id, _report):
        inside.append(adapter_id)
        time.sleep(0.001)
        order.append(list(inside))
        inside.remove(adapter_id)

    with make_loader(gate, on_done, threads=8) as loader:
        for adapter_id in adapters:
            loader.want(adapter_id, adapter_id)
        gate.wait_started(8)
        finished = random.Random(3).sample(adapters, 8)
        for adapter_id in finished:
            gate.open(adapter_id)
            eventually(lambda adapter_id=adapter_id: loader.state(adapter_id) is LoadState.STAGED)
        eventually(lambda: len(order) == 8)
    assert order == [[adapter_id] for adapter_id in finished]


def test_on_done_may_call_the_loader():
    gate, told = Gate(), Told()
    taken = []

    def on_done(adapter_id, report):
        taken.append(loader.take(adapter_id))
        if adapter_id < 3:
            loader.want(adapter_id + 1, adapter_id + 1)
        loader.drop(adapter_id)
        told(adapter_id, report)

    with make_loader(gate, on_done) as loader:
        loader.want(1, 1)
        told.wait(3)
    assert taken == ["weights 1", "weights 2", "weights 3"]


def test_an_error_in_on_done_is_logged_and_loses_no_thread(caplog):
    gate, told = Gate(), Told()

    def on_done(adapter_id, report):
        told(adapter_id, report)
        raise {1: ValueError("full"), 2: SystemExit(3)}.get(adapter_id, KeyError())

    with make_loader(gate, on_done, threads=1) as loader:
        for adapter_id in (1, 2, 3):
            loader.want(adapter_id, adapter_id)
            told.wait(adapter_id)
    assert "Telling of the load of adapter 1 failed" in caplog.text
    assert "ended in an exit" in caplog.text


def test_dropping_a_queued_adapter_means_that_it_is_never_loaded():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told, threads=1) as loader:
        for adapter_id in (1, 2, 3):
            loader.want(adapter_id, adapter_id)
        gate.wait_started(1)
        loader.drop(2)
        gate.open(1)
        told.wait(2)
    assert gate.started == [1, 3]


def test_dropping_a_loading_adapter_discards_what_it_brings():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told) as loader:
        loader.want(1, 1)
        gate.wait_started(1)
        loader.drop(1)
        gate.open(1)
        eventually(lambda: loader.counts().loading == 0)
        assert loader.take(1) is None
        loader.want(2, 2)
        told.wait()
    assert [adapter_id for adapter_id, _ in told.entries] == [2]


def test_dropping_a_staged_adapter_discards_it():
    gate, told = Gate(), Told()
    with make_loader(gate, told) as loader:
        loader.want(1, 1)
        told.wait()
        loader.drop(1)
        assert loader.take(1) is None
        assert loader.counts() == LoaderCounts(queued=0, loading=0, staged=0, hanging=0)


def test_nothing_is_told_of_an_adapter_after_it_was_dropped():
    """The answer that is on its way is taken back; the one being given is waited for."""
    gate = Gate()
    inside, let_go = threading.Event(), threading.Event()
    told = []

    def on_done(adapter_id, _report):
        if adapter_id == 1:
            inside.set()
            assert let_go.wait(PATIENCE_S)
        told.append(adapter_id)

    with make_loader(gate, on_done) as loader:
        loader.want(1, 1)
        assert inside.wait(PATIENCE_S)
        loader.want(2, 2)
        eventually(lambda: loader.state(2) is LoadState.STAGED)
        loader.drop(2)  # Its answer waits behind that of adapter 1.
        dropped = threading.Thread(target=loader.drop, args=(1,))
        dropped.start()
        dropped.join(0.05)
        assert dropped.is_alive()
        let_go.set()
        dropped.join(PATIENCE_S)
        assert told == [1]
    assert told == [1]


def test_a_failure_is_told_with_kind_and_message():
    gate, told = Gate(), Told()
    gate.outcomes = {1: FileNotFoundError("no such adapter"), 2: ValueError("rank 9, at most 8")}
    with make_loader(gate, told, threads=1) as loader:
        loader.want(1, 1)
        loader.want(2, 2)
        failures = {adapter_id: report.failure for adapter_id, report in told.wait(2)}
        assert loader.state(1) is LoadState.FAILED
        assert loader.take(1) is None
    assert (failures[1].kind, failures[1].message) == (FailureKind.GONE, "no such adapter")
    assert (failures[2].kind, failures[2].message) == (FailureKind.INVALID, "rank 9, at most 8")


def test_the_caller_may_classify_failures():
    gate, told = Gate(), Told()
    gate.outcomes = {1: RuntimeError("allocator: out of memory"), 2: RuntimeError("?")}

    def classify(error):
        if "memory" in str(error):
            return FailureKind.NO_MEMORY
        raise KeyError(error)

    with make_loader(gate, told, threads=1, classify=classify) as loader:
        loader.want(1, 1)
        loader.want(2, 2)
        kinds = [report.failure.kind for _, report in told.wait(2)]
    assert kinds == [FailureKind.NO_MEMORY, FailureKind.INTERNAL]


@pytest.mark.parametrize(
    "outcome", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()], ids=lambda e: type(e).__name__
)
def test_a_load_that_would_end_its_thread_fails_as_internal_and_costs_no_capacity(outcome, caplog):
    gate, told = Gate(), Told()
    gate.outcomes = {1: outcome}
    with make_loader(gate, told, threads=1) as loader:
        loader.want(1, 1)
        assert told.wait()[0][1].failure.kind is FailureKind.INTERNAL
        loader.want(2, 2)
        assert told.wait(2)[1][1].failure is None
    assert "failed unexpectedly" in caplog.text


def test_a_load_that_returns_nothing_is_a_fault():
    told = Told()
    loader = BackgroundLoader(
        lambda _request: None,
        threads=1,
        staged_limit=1,
        timeout_s=1.0,
        retry_delay_s=0.0,
        on_done=told,
    )
    loader.want(1, 1)
    assert told.wait()[0][1].failure.message == "loading returned nothing"
    assert loader.close(PATIENCE_S)


def test_a_failure_answers_without_touching_the_disk_until_the_retry_delay_is_over():
    now = [100.0]
    gate, told = Gate(), Told()
    gate.outcomes = {"first": ValueError("torn")}
    options = {"retry_delay_s": 5.0, "clock": lambda: now[0]}
    with make_loader(gate, told, **options) as loader:
        loader.want(1, "first")
        told.wait()
        now[0] += 4.9
        assert loader.want(1, "second") is LoadState.FAILED
        assert told.wait(2)[1][1].request == "second"
        assert told.entries[1][1].failure == told.entries[0][1].failure
        with pytest.raises(LoadFailedError, match=r"adapter 1 .* \(invalid\): torn"):
            loader.wait(1, 1, timeout_s=1.0)
        assert len(gate.started) == 1
        now[0] += 0.1
        loader.want(1, "third")
        assert told.wait(3)[2][1].failure is None


def test_forget_ends_the_retry_delay():
    gate, told = Gate(), Told()
    gate.outcomes = {1: ValueError("torn")}
    with make_loader(gate, told) as loader:
        loader.want(1, 1)
        told.wait()
        loader.drop(1)
        assert loader.want(1, 1) is LoadState.FAILED
        del gate.outcomes[1]
        loader.forget(1)
        assert loader.wait(1, 1, timeout_s=PATIENCE_S) == "weights 1"


def test_wait_loads_jumps_the_queue_and_is_not_told_of():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told, threads=1) as loader:
        for adapter_id in (1, 2, 3):
            loader.want(adapter_id, adapter_id)
        gate.wait_started(1)
        with waiting(loader, 9) as outcome:
            eventually(lambda: loader.state(9) is LoadState.QUEUED)
            gate.open(1)
        assert outcome == ["weights 9"]
        told.wait(3)
        assert gate.started[:2] == [1, 9]
        assert loader.take(9) is None
    assert [adapter_id for adapter_id, _ in told.entries] == [1, 2, 3]


def test_wait_shares_a_load_under_way_and_all_who_wait_get_it():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told) as loader:
        loader.want(1, 1)
        gate.wait_started(1)
        with waiting(loader, 1) as first, waiting(loader, 1) as second:
            gate.open(1)
        assert first == second == ["weights 1"]
        told.wait()
        assert gate.started == [1]
        assert loader.state(1) is LoadState.IDLE


def test_wait_takes_what_is_staged_and_needs_no_free_place():
    gate, told = Gate(), Told()
    with make_loader(gate, told, staged_limit=1) as loader:
        loader.want(1, 1)
        told.wait()
        assert loader.wait(2, 2, timeout_s=PATIENCE_S) == "weights 2"
        assert loader.wait(1, 1, timeout_s=PATIENCE_S) == "weights 1"
        assert loader.counts().staged == 0


def test_wait_raises_the_loads_failure_and_the_want_is_told_of_it_too():
    gate, told = Gate(closed=[1]), Told()
    gate.outcomes = {1: PermissionError("not allowed")}
    with make_loader(gate, told) as loader:
        loader.want(1, 1)
        with waiting(loader, 1) as outcome:
            gate.wait_started(1)
            gate.open(1)
        assert isinstance(outcome[0], LoadFailedError)
        assert outcome[0].failure.kind is FailureKind.UNREADABLE
        assert outcome[0].adapter_id == 1
        assert told.wait()[0][1].failure == outcome[0].failure


def test_wait_ends_after_its_own_time_while_the_load_goes_on():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told) as loader:
        with pytest.raises(LoadFailedError, match=r"\(timeout\): it was not loaded within 0.02 s"):
            loader.wait(1, 1, timeout_s=0.02)
        gate.open(1)
        assert loader.wait(1, 1, timeout_s=PATIENCE_S) == "weights 1"
        assert gate.started == [1]


@pytest.mark.parametrize("closed", [(1,), (7, 8, 1)], ids=["loading", "queued"])
def test_wait_ends_when_the_adapter_is_dropped(closed):
    gate, told = Gate(closed=closed), Told()
    with make_loader(gate, told) as loader:
        for adapter_id in closed:
            if adapter_id != 1:
                loader.want(adapter_id, adapter_id)
        gate.wait_started(len(closed) - 1)
        with waiting(loader, 1) as outcome:
            eventually(lambda: loader.state(1) is not LoadState.IDLE)
            loader.drop(1)
        assert isinstance(outcome[0], LoadDroppedError)


def test_a_hanging_load_times_out_and_its_thread_is_replaced():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told, threads=1, timeout_s=HANG_S) as loader:
        loader.want(1, 1)
        failure = told.wait()[0][1].failure
        assert failure.kind is FailureKind.TIMEOUT
        assert told.entries[0][1].load_s >= HANG_S
        assert loader.counts() == LoaderCounts(queued=0, loading=0, staged=0, hanging=1)
        loader.want(2, 2)
        assert told.wait(2)[1][1].failure is None
        assert loader.take(2) == "weights 2"


def test_what_a_hanging_load_brings_late_is_discarded_and_its_thread_ends():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told, threads=1, timeout_s=HANG_S, retry_delay_s=0.0) as loader:
        loader.want(1, 1)
        told.wait()
        assert loader.want(1, 1) is LoadState.FAILED  # However short the retry delay is.
        assert len(loader_threads()) == 3  # Timer, replacement, and the one that hangs.
        gate.open(1)
        eventually(lambda: len(loader_threads()) == 2)
        assert loader.counts().hanging == 0
        assert loader.take(1) is None
        loader.want(1, 1)
        assert told.wait(3)[2][1].failure is None
    assert gate.started == [1, 1]


def test_a_waiter_of_a_hanging_load_is_let_go():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told, timeout_s=HANG_S) as loader:
        with waiting(loader, 1) as outcome:
            pass
        assert outcome[0].failure.kind is FailureKind.TIMEOUT


def test_storage_that_hangs_for_good_costs_a_bounded_number_of_threads():
    """With two threads, two more stand in; then wants fail at once, until a load returns."""
    hanging = [1, 2, 3, 4, 5]
    gate, told = Gate(closed=hanging), Told()
    with make_loader(gate, told, threads=2, timeout_s=HANG_S) as loader:
        for adapter_id in hanging:
            loader.want(adapter_id, adapter_id)
        reports = dict(told.wait(5))
        assert sorted(gate.started) == [1, 2, 3, 4]
        assert len(loader_threads()) == 5
        assert "the storage hangs: 4 loads were given up" in reports[5].failure.message
        assert reports[5].failure.kind is FailureKind.TIMEOUT

        assert loader.want(6, 6) is LoadState.FAILED
        assert "the storage hangs" in told.wait(6)[5][1].failure.message
        with pytest.raises(LoadFailedError, match="the storage hangs"):
            loader.wait(6, 6, timeout_s=PATIENCE_S)

        gate.open(1)
        eventually(lambda: loader.counts().hanging == 3)
        loader.want(6, 6)  # Nothing was held against it.
        assert told.wait(7)[6][1].failure is None

        gate.open_all()
        eventually(lambda: loader.counts().hanging == 0)
        eventually(lambda: len(loader_threads()) == 3)
        for adapter_id in (7, 8):
            loader.want(adapter_id, adapter_id)
        told.wait(9)


def test_a_dropped_load_that_hangs_is_replaced_as_well_and_not_told_of():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told, threads=1, timeout_s=HANG_S) as loader:
        loader.want(1, 1)
        gate.wait_started(1)
        loader.drop(1)
        loader.want(2, 2)
        assert told.wait()[0][0] == 2
        assert loader.counts().hanging == 1
    assert [adapter_id for adapter_id, _ in told.entries] == [2]


def test_no_thread_to_be_had_fails_wants_until_there_is_one(monkeypatch):
    gate, told = Gate(), Told()

    def cannot_start(_thread):
        raise RuntimeError("can't start new thread")

    with make_loader(gate, told) as loader:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", cannot_start)
            assert loader.want(1, 1) is LoadState.FAILED
        assert told.wait()[0][1].failure.message == "no thread to load with could be started"
        loader.want(1, 1)
        assert told.wait(2)[1][1].failure is None


def test_an_idle_loader_does_not_keep_alive_what_it_loaded():
    class Weights:
        pass

    gate, told = Gate(), Told()
    weights = [Weights(), Weights()]
    gate.outcomes = {1: weights[0], 2: weights[1]}
    with make_loader(gate, told, threads=1) as loader:
        for adapter_id in (1, 2):
            loader.want(adapter_id, adapter_id)
        told.wait(2)
        gate.outcomes.clear()
        alive = [weakref.ref(each) for each in weights]
        weights.clear()
        loader.take(1)
        loader.drop(2)
        gc.collect()
        assert [ref() for ref in alive] == [None, None]


def test_threads_are_named_daemons_and_none_runs_before_the_first_want():
    gate, told = Gate(), Told()
    with make_loader(gate, told, threads=2) as loader:
        assert loader_threads() == []
        loader.want(1, 1)
        told.wait()
        threads = loader_threads()
        assert all(thread.daemon for thread in threads)
        assert sorted(thread.name for thread in threads) == [
            "multilora-load-0",
            "multilora-load-1",
            "multilora-load-timer",
        ]


def test_close_drops_everything_ends_the_threads_and_tells_nothing_more():
    gate, told = Gate(closed=[1, 2]), Told()
    with make_loader(gate, told, threads=1) as loader:
        loader.want(1, 1)
        loader.want(2, 2)
        gate.wait_started(1)
        with waiting(loader, 2) as outcome:
            eventually(lambda: loader.state(2) is LoadState.QUEUED)
            assert not loader.close(0.02)
        assert isinstance(outcome[0], LoaderClosedError)
        gate.open(1)
        assert loader.close(PATIENCE_S)
        assert loader_threads() == []
        assert gate.started == [1]
        assert told.entries == []
        assert loader.take(1) is None
        loader.drop(1)
        with pytest.raises(LoaderClosedError):
            loader.want(3, 3)
        with pytest.raises(LoaderClosedError):
            loader.wait(3, 3, timeout_s=1.0)


def test_close_does_not_wait_for_a_hanging_load():
    gate, told = Gate(closed=[1]), Told()
    with make_loader(gate, told, threads=1, timeout_s=0.02) as loader:
        loader.want(1, 1)
        told.wait()
        assert not loader.close(0.02)
        assert [thread.name for thread in loader_threads()] == ["multilora-load-0"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("threads", 0),
        ("staged_limit", 0),
        ("timeout_s", 0.0),
        ("timeout_s", float("inf")),
        ("timeout_s", float("nan")),
        ("retry_delay_s", -1.0),
        ("retry_delay_s", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(option, value):
    with (
        pytest.raises(ValueError, match=f"{option} must be"),
        make_loader(Gate(), Told(), **{option: value}),
    ):
        pass


@pytest.mark.parametrize("seed", range(4))
def test_under_stress_limits_hold_and_every_want_is_answered(seed):
    """Several threads want, take, drop and wait at random; some loads fail."""
    adapters, threads, limit = range(1, 13), 3, 4
    lock = threading.Lock()
    running, faults = [], []
    told = Told()

    def load(request):
        adapter_id, serial = request
        with lock:
            if adapter_id in running or len(running) >= threads:
                faults.append(("at once", adapter_id, list(running)))
            running.append(adapter_id)
        time.sleep(serial % 4 * 0.0005)
        with lock:
            running.remove(adapter_id)
        if serial % 7 == 0:
            raise ValueError("torn")
        return adapter_id

    loader = BackgroundLoader(
        load,
        threads=threads,
        staged_limit=limit,
        timeout_s=PATIENCE_S,
        retry_delay_s=0.002,
        on_done=told,
    )

    def drive(number):
        random_ = random.Random(100 * seed + number)
        for step in range(150):
            adapter_id = random_.choice(adapters)
            action = random_.choice(["want", "want", "want", "take", "take", "drop", "wait"])
            request = (adapter_id, 1000 * number + step)
            try:
                if action == "want":
                    loader.want(adapter_id, request)
                elif action == "take":
                    if loader.take(adapter_id) not in (None, adapter_id):
                        faults.append(("took another", adapter_id))
                elif action == "drop":
                    loader.drop(adapter_id)
                elif loader.wait(adapter_id, request, timeout_s=PATIENCE_S) != adapter_id:
                    faults.append(("waited for another", adapter_id))
            except (LoadFailedError, LoadDroppedError) as error:
                if "within" in str(error):
                    faults.append(("waited in vain", adapter_id))
            counts = loader.counts()
            if counts.loading > threads or counts.hanging:
                faults.append(("counts", counts))

    drivers = [threading.Thread(target=drive, args=(number,)) for number in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(3 * PATIENCE_S)
    assert not any(driver.is_alive() for driver in drivers)

    # Whatever was left queued must come once there is room, and be told of with its own request.
    for adapter_id in adapters:
        loader.drop(adapter_id)
    told.entries.clear()
    for adapter_id in adapters:
        loader.want(adapter_id, (adapter_id, 1))
    answered = set()
    end = time.monotonic() + PATIENCE_S
    while len(answered) < len(adapters):
        assert time.monotonic() < end
        for adapter_id, reports in told.by_adapter().items():
            answered.add(adapter_id)
            assert [report.request for report in reports] == [(adapter_id, 1)]
            loader.take(adapter_id)
        time.sleep(0.001)
    assert loader.close(PATIENCE_S)
    assert faults == []
