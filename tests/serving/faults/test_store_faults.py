"""A store that dies or freezes: requests wait, and all are answered; what is in slots serves on."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from ..cache_probe import report
from ..engine import answer, assert_as_peft, greedy, lora_request, running_engine
from ..models.cases import Case, Scenario
from ..stores import await_end, store_process, store_process_now

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

pytestmark = pytest.mark.serving

SLOTS = 3
FREEZE_S = 5.0
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def engine(fleet: Scenario) -> "Iterator[LLM]":
    # Answers that come from cached prefixes would not use the adapter's weights.
    with running_engine(
        fleet.base, in_process=True, max_loras=SLOTS, max_cpu_loras=20, enable_prefix_caching=False
    ) as llm:
        yield llm


def store_of(llm: "LLM") -> psutil.Process:
    return store_process(Path(report(llm)["store"].removeprefix("unix:")))


def kill(process: psutil.Process) -> None:
    process.kill()
    await_end(process, LIMIT_S)


def cases_of(fleet: Scenario, numbers: Sequence[int]) -> list[Case]:
    return [case for number in numbers for case in fleet.cases_of(f"customer-{number}")]


def test_a_store_that_is_killed_while_it_reads_loses_no_request(
    engine: "LLM", fleet: Scenario
) -> None:
    """It is killed again and again while twenty adapters pass through three slots."""
    cases = cases_of(fleet, range(10, 30))
    killed = []
    is_answered = threading.Event()

    def kill_often() -> None:
        while len(killed) < 4 and not is_answered.wait(0.2):
            # None is started where nobody needs one any more.
            if (process := store_process_now(path)) is not None:
                kill(process)
                killed.append(process.pid)

    path = Path(report(engine)["store"].removeprefix("unix:"))
    killer = threading.Thread(target=kill_often)
    killer.start()
    outputs = answer(engine, fleet, cases)
    is_answered.set()
    killer.join()
    assert_as_peft(outputs, cases)
    assert len(set(killed)) >= 2, killed


def test_a_registration_outlives_the_store_that_it_was_asked_of(
    engine: "LLM", fleet: Scenario
) -> None:
    assert engine.llm_engine.add_lora(lora_request(fleet, "customer-35"))  # there is a store now
    process = store_of(engine)
    process.suspend()
    threading.Timer(1.0, process.kill).start()
    assert engine.llm_engine.add_lora(lora_request(fleet, "customer-36"))
    cases = cases_of(fleet, [36])
    assert_as_peft(answer(engine, fleet, cases), cases)


def test_while_the_store_stands_still_slots_serve_and_cold_requests_wait(
    engine: "LLM", fleet: Scenario
) -> None:
    hot, cold = cases_of(fleet, [0, 37])
    assert_as_peft(answer(engine, fleet, [hot]), [hot])
    process = store_of(engine)
    process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    try:
        submit(engine, fleet, "cold", cold)
        served = 0
        while time.monotonic() - begin < FREEZE_S:
            submit(engine, fleet, f"hot-{served}", hot)
            found = run_until(engine, lambda name: name.startswith("hot"))
            assert_as_peft([found], [hot])
            served += 1
    finally:
        process.send_signal(signal.SIGCONT)
    assert served > 5
    assert_as_peft([run_until(engine, lambda name: name == "cold")], [cold])


def submit(llm: "LLM", fleet: Scenario, name: str, case: Case) -> None:
    assert case.adapter is not None
    llm.llm_engine.add_request(
        name,
        {"prompt_token_ids": list(case.prompt)},
        greedy(),
        lora_request=lora_request(fleet, case.adapter),
    )


def run_until(llm: "LLM", is_awaited: Callable[[str], bool]) -> "RequestOutput":
    """The first answer that is complete, which must be an awaited one."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for output in llm.llm_engine.step():
            if output.finished:
                assert is_awaited(output.request_id)
                return output
    raise AssertionError("no answer")
