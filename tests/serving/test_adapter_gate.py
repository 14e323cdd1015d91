"""The engine core's view of its workers' adapters, with workers that only say what a test says."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vllm_multilora.cache.load_failures import FailureKind, LoadFailure
from vllm_multilora.cache.readiness import Standing
from vllm_multilora.cache.readiness_events import (
    Displaced,
    Event,
    Failed,
    Lost,
    Placed,
    Ready,
)

from .gate_fakes import PROBLEM, Engine, Executor, lora

if TYPE_CHECKING:
    from vllm_multilora.integration.adapter_gate import BlockingGate

pytestmark = pytest.mark.serving

GONE = LoadFailure(FailureKind.GONE, "no such folder")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.close()


def test_what_was_wanted_since_the_last_step_goes_out_in_one_call(engine: Engine) -> None:
    for number in (1, 2, 3):
        engine.gate.want(lora(number))
    engine.gate.want(lora(1))  # on its way already
    assert engine.executor.calls == []
    engine.gate.poll()
    assert len(engine.executor.calls) == 1
    assert engine.executor.take() == [("Prefetch", 1), ("Prefetch", 2), ("Prefetch", 3)]
    engine.gate.poll()
    assert engine.executor.take() == []


def test_replies_are_read_though_not_waited_for(engine: Engine) -> None:
    for number in range(1, 10):
        engine.gate.want(lora(number))
        engine.gate.poll()
    was_read = [reply.was_read for reply in engine.executor.replies]
    assert was_read == [True] * 7 + [False] * 2


def test_an_adapter_is_ready_once_every_rank_has_said_so(engine: Engine) -> None:
    assert engine.gate.standing(lora(1)) is Standing.LOADING
    engine.gate.poll()
    serial = engine.newest_serial(1)
    engine.say(Ready(1, serial), ranks=(0,))
    engine.gate.poll()
    assert engine.gate.standing(lora(1)) is Standing.LOADING
    engine.say(Ready(1, serial), ranks=(1,))
    engine.gate.poll()
    assert engine.gate.standing(lora(1)) is Standing.READY
    assert engine.executor.take() == [("Prefetch", 1)]


def test_a_failure_answers_until_a_new_request_arrives(engine: Engine) -> None:
    engine.gate.want(lora(1))
    engine.gate.poll()
    engine.say(Failed(1, engine.newest_serial(1), GONE), ranks=(1,))
    engine.gate.poll()
    assert engine.gate.standing(lora(1)) is Standing.FAILED
    assert engine.gate.failure(1) == GONE
    engine.executor.take()
    engine.gate.want(lora(1))
    engine.gate.poll()
    assert engine.gate.standing(lora(1)) is Standing.LOADING
    assert engine.executor.take() == [("Prefetch", 1)]


def test_an_adapter_that_was_lost_is_asked_for_when_it_is_next_needed(engine: Engine) -> None:
    engine.load(1)
    engine.say(Lost(1), ranks=(0,))
    engine.gate.poll()
    assert engine.executor.take() == []
    assert engine.gate.standing(lora(1)) is Standing.LOADING
    engine.gate.poll()
    assert engine.executor.take() == [("Prefetch", 1)]


def test_another_adapter_under_the_same_number_is_another_question(engine: Engine) -> None:
    engine.load(1)
    engine.gate.want(lora(1, "/elsewhere"))
    assert engine.gate.standing(lora(1, "/elsewhere")) is Standing.LOADING
    engine.gate.poll()
    assert engine.executor.take() == [("Prefetch", 1)]


def test_an_adapter_that_a_step_was_without_is_told_of_once(engine: Engine) -> None:
    from vllm_multilora.integration.adapter_gate import LOST_IN_STEP

    engine.load(1)
    engine.say(Failed(1, LOST_IN_STEP, GONE), ranks=(0,))
    engine.gate.poll()
    assert engine.gate.take_lost() == {1: GONE}
    assert engine.gate.take_lost() == {}
    assert engine.gate.failure(1) is None  # a new request is a new try
    assert engine.gate.standing(lora(1)) is Standing.LOADING


def test_missed_events_have_everything_asked_for_again(engine: Engine) -> None:
    engine.load(1)
    for _ in range(20):  # more than the ring holds
        engine.say(Lost(7), ranks=(0,))
    engine.gate.poll()
    assert engine.gate.standing(lora(1)) is Standing.LOADING
    serial = engine.newest_serial(1)
    assert engine.executor.take() == [("Prefetch", 1)]
    engine.say(Ready(1, serial))
    engine.gate.poll()
    assert engine.gate.standing(lora(1)) is Standing.READY


def test_what_nobody_waits_for_is_dropped(engine: Engine) -> None:
    engine.gate.want(lora(1))
    engine.gate.poll()
    serial = engine.newest_serial(1)
    engine.executor.take()
    engine.gate.drop(1)
    engine.gate.drop(1)
    engine.gate.drop(2)  # never asked for
    engine.gate.poll()
    assert engine.executor.take() == [("Drop", 1)]
    engine.say(Ready(1, serial))  # too late
    engine.gate.poll()
    assert engine.gate.standing(lora(1)) is Standing.LOADING


def test_forgetting_asks_nothing_of_the_workers(engine: Engine) -> None:
    engine.load(1)
    engine.gate.forget(1)
    engine.gate.poll()
    assert engine.executor.take() == []
    assert engine.gate.standing(lora(1)) is Standing.LOADING


def test_a_registration_ends_when_all_ranks_have_the_adapter(engine: Engine) -> None:
    first, second = engine.gate.register(lora(1)), engine.gate.register(lora(1))
    serial = engine.newest_serial(1)
    assert engine.executor.take() == [("Prefetch", 1)]
    engine.gate.drop(1)  # a request for it was aborted meanwhile
    engine.say(Ready(1, serial), ranks=(0,))
    engine.gate.poll()
    assert not first.done()
    engine.say(Ready(1, serial), ranks=(1,))
    engine.gate.poll()
    assert (first.result(0), second.result(0)) == (True, True)
    assert engine.executor.take() == [("Keep", 1)]


def test_a_registration_fails_with_the_reason_and_all_problems(engine: Engine) -> None:
    future = engine.gate.register(lora(1))
    engine.say(Failed(1, engine.newest_serial(1), GONE), ranks=(1,))
    engine.executor.take()
    engine.gate.poll()
    assert_refused(future)
    assert engine.executor.take() == [("Drop", 1)]
    assert engine.gate.failure(1) is None


def assert_refused(future: "Future[bool]") -> None:
    from vllm_multilora.integration.failures import AdapterRefusedError

    error = future.exception(0)
    assert isinstance(error, AdapterRefusedError)
    assert error.failure == GONE
    assert error.problems == [PROBLEM]


def test_registering_what_is_ready_loads_nothing(engine: Engine) -> None:
    engine.load(1)
    assert engine.gate.register(lora(1)).result(0) is True
    assert engine.executor.take() == [("Keep", 1)]


def test_registering_anew_loads_what_is_ready_already(engine: Engine) -> None:
    old = engine.load(1)
    future = engine.gate.register(lora(1, load_inplace=True))
    assert not future.done()
    assert engine.newest_serial(1) > old
    engine.say(Ready(1, engine.newest_serial(1)))
    engine.gate.poll()
    assert future.result(0) is True


@pytest.mark.parametrize("loss", ["evicted", "without it in a step", "removed"])
def test_a_registration_survives_the_loss_of_its_adapter(engine: Engine, loss: str) -> None:
    """What a rank says between two looks may be that it had the adapter and lost it."""
    from vllm_multilora.integration.adapter_gate import LOST_IN_STEP

    future = engine.gate.register(lora(1))
    serial = engine.newest_serial(1)
    if loss == "removed":
        engine.gate.forget(1)
    else:
        engine.say(Ready(1, serial))
        event = Lost(1) if loss == "evicted" else Failed(1, LOST_IN_STEP, GONE)
        engine.say(event, ranks=(0,))
    engine.gate.poll()
    assert not future.done()
    assert engine.newest_serial(1) > serial
    engine.say(Ready(1, engine.newest_serial(1)))
    engine.gate.poll()
    assert future.result(0) is True


def test_an_adapter_is_placed_once_every_rank_has_said_so(engine: Engine) -> None:
    engine.load(1)
    assert not engine.gate.is_placed(1)
    assert not engine.gate.is_placed(1)
    engine.gate.place(frozenset({2}))
    (order,) = engine.executor.calls.pop()
    assert (order.lora_id, order.needed) == (1, frozenset({2}))
    engine.say(Placed(1, order.serial), ranks=(0,))
    engine.gate.poll()
    assert not engine.gate.is_placed(1)
    engine.say(Placed(1, order.serial), ranks=(1,))
    engine.gate.poll()
    assert engine.gate.is_placed(1)
    engine.gate.place(frozenset())
    assert engine.executor.take() == []


@pytest.mark.parametrize("event", [Displaced(1), Lost(1)])
def test_an_adapter_without_its_slot_is_asked_for_anew(engine: Engine, event: Event) -> None:
    place(engine, 1)
    engine.say(event, ranks=(1,))
    engine.gate.poll()
    assert not engine.gate.is_placed(1)
    engine.gate.place(frozenset())
    assert engine.executor.take() == [("Place", 1)]


def test_leaving_a_slot_is_not_leaving_host_memory(engine: Engine) -> None:
    place(engine, 1)
    engine.say(Displaced(1))
    engine.gate.poll()
    assert engine.gate.standing(lora(1)) is Standing.READY


def test_placements_that_may_have_ended_unheard_are_asked_for_anew(engine: Engine) -> None:
    place(engine, 1)
    for _ in range(20):  # more than the ring holds
        engine.say(Displaced(7), ranks=(0,))
    engine.gate.poll()
    assert not engine.gate.is_placed(1)


def test_a_forgotten_adapter_is_not_placed(engine: Engine) -> None:
    engine.load(1)
    assert not engine.gate.is_placed(1)
    engine.gate.forget(1)
    engine.gate.place(frozenset())
    assert engine.executor.take() == []


def place(engine: Engine, number: int) -> None:
    """Has an adapter loaded and placed on all ranks."""
    engine.load(number)
    assert not engine.gate.is_placed(number)
    engine.gate.place(frozenset())
    (order,) = engine.executor.calls.pop()
    engine.say(Placed(number, order.serial))
    engine.gate.poll()
    assert engine.gate.is_placed(number)


@pytest.fixture
def blocking() -> "tuple[BlockingGate, Executor]":
    from vllm_multilora.integration.adapter_gate import BlockingGate

    executor = Executor()
    return BlockingGate(executor.collective_rpc), executor


def test_a_blocking_gate_loads_as_it_is_asked(blocking: "tuple[BlockingGate, Executor]") -> None:
    gate, executor = blocking
    gate.want(lora(1))
    assert executor.ensured == []
    assert gate.standing(lora(1)) is Standing.READY
    assert executor.ensured == [1]
    assert gate.failure(1) is None


def test_a_blocking_gate_remembers_a_failure_until_a_new_request_arrives(
    blocking: "tuple[BlockingGate, Executor]",
) -> None:
    gate, executor = blocking
    executor.failures[1] = GONE
    assert [gate.standing(lora(1)) for _ in range(3)] == [Standing.FAILED] * 3
    assert executor.ensured == [1]
    assert gate.failure(1) == GONE
    del executor.failures[1]
    gate.want(lora(1))
    assert gate.standing(lora(1)) is Standing.READY


def test_a_blocking_gate_registers_or_says_why_not(
    blocking: "tuple[BlockingGate, Executor]",
) -> None:
    gate, executor = blocking
    assert gate.register(lora(1)).result(0) is True
    assert executor.take() == [("Keep", 1)]
    executor.failures[2] = GONE
    assert_refused(gate.register(lora(2)))
    assert executor.take() == []
    assert gate.failure(2) is None
