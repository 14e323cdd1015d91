"""Loads that do not return, and threads that cannot be had."""

import threading

import pytest

from tests.cache.gated_loads import (
    HANG_S,
    PATIENCE_S,
    Gate,
    Told,
    eventually,
    loader_threads,
    make_loader,
    waiting,
)
from vllm_multilora.cache.load_failures import FailureKind, LoadFailedError
from vllm_multilora.cache.load_queue import LoadState
from vllm_multilora.cache.loader import LoaderCounts


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
