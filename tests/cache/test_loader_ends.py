"""Every load that ends is told of once, whether or not somebody wanted it to the end."""

from tests.cache.gated_loads import (
    HANG_S,
    Gate,
    Told,
    eventually,
    loader_threads,
    make_loader,
    waiting,
)
from vllm_multilora.cache.load_failures import FailureKind, LoadFailure


class Ends:
    """What `on_end` was called with: request, and what came of it."""

    def __init__(self):
        self.entries = []
        self.seconds = []

    def __call__(self, request, outcome, seconds):
        is_failure = isinstance(outcome, LoadFailure)
        self.entries.append((request, outcome.kind if is_failure else outcome))
        self.seconds.append(seconds)


def test_wanted_and_waited_loads_are_told_of_alike():
    gate, told, ends = Gate(), Told(), Ends()
    with make_loader(gate, told, on_end=ends) as loader:
        loader.want(1, 1)
        told.wait()
        loader.want(1, 1)  # staged already: no load
        with waiting(loader, 2):
            pass
    assert ends.entries == [(1, "weights 1"), (2, "weights 2")]
    assert min(ends.seconds) >= 0


def test_a_failure_is_told_of_once_however_many_it_answers():
    gate, told, ends = Gate(), Told(), Ends()
    gate.outcomes[1] = FileNotFoundError("adapter_model.safetensors")
    with make_loader(gate, told, on_end=ends) as loader:
        loader.want(1, 1)
        told.wait()
        loader.want(1, 1)
        told.wait(2)
    assert ends.entries == [(1, FailureKind.GONE)]


def test_a_load_that_nobody_wants_any_more_is_told_of():
    gate, told, ends = Gate(closed=[1]), Told(), Ends()
    with make_loader(gate, told, on_end=ends) as loader:
        loader.want(1, 1)
        gate.wait_started(1)
        loader.drop(1)
        gate.open(1)
        eventually(lambda: ends.entries == [(1, "weights 1")])
    assert told.entries == []


def test_a_load_that_was_given_up_has_ended_and_what_it_brings_late_is_no_end():
    gate, told, ends = Gate(closed=[1]), Told(), Ends()
    with make_loader(gate, told, on_end=ends, threads=1, timeout_s=HANG_S) as loader:
        loader.want(1, 1)
        told.wait()
        gate.open(1)
        eventually(lambda: len(loader_threads()) == 2)
    assert ends.entries == [(1, FailureKind.TIMEOUT)]
    assert ends.seconds[0] >= HANG_S
