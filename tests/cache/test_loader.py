"""The background loader with real threads: wants, answers, takes, drops, and its end."""

import gc
import random
import threading
import time
import weakref

import pytest

from tests.cache.gated_loads import (
    PATIENCE_S,
    Gate,
    Told,
    eventually,
    loader_threads,
    make_loader,
    waiting,
)
from vllm_multilora.cache.load_failures import LoaderClosedError
from vllm_multilora.cache.load_queue import LoadState
from vllm_multilora.cache.loader import LoaderCounts


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


def test_answers_still_on_their_way_are_taken_back_by_close():
    gate = Gate()
    inside, let_go = threading.Event(), threading.Event()
    told = []

    def on_done(adapter_id, _report):
        told.append(adapter_id)
        inside.set()
        assert let_go.wait(PATIENCE_S)

    with make_loader(gate, on_done) as loader:
        loader.want(1, 1)
        assert inside.wait(PATIENCE_S)
        loader.want(2, 2)
        eventually(lambda: loader.state(2) is LoadState.STAGED)
        assert not loader.close(0.02)
        let_go.set()
    assert told == [1]


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
