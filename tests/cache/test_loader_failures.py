"""Loads that fail: what is told, and when an adapter may be tried again."""

import pytest

from tests.cache.gated_loads import PATIENCE_S, Gate, Told, make_loader
from vllm_multilora.cache.load_failures import FailureKind, LoadFailedError
from vllm_multilora.cache.load_queue import LoadState
from vllm_multilora.cache.loader import BackgroundLoader


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
