"""Blocking until an adapter is loaded."""

import pytest

from tests.cache.gated_loads import PATIENCE_S, Gate, Told, eventually, make_loader, waiting
from vllm_multilora.cache.load_failures import FailureKind, LoadDroppedError, LoadFailedError
from vllm_multilora.cache.load_queue import LoadState


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
