"""Faults that no file can cause: hanging storage, dying threads, no memory, a lost race."""

import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .cases import Case, Scenario
from .engine import answer, running_engine

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

pytestmark = pytest.mark.serving

SLOTS = 3
TIMEOUT_S = 2.0
VICTIM = "customer-9"


@pytest.fixture(scope="module")
def engine(fleet: Scenario) -> "Iterator[LLM]":
    with running_engine(
        fleet.base,
        max_loras=SLOTS,
        max_cpu_loras=SLOTS,
        additional_config={"multilora": {"load_timeout_s": TIMEOUT_S}},
    ) as llm:
        yield llm


def cases_of(fleet: Scenario, *names: str | None) -> list[Case]:
    return [fleet.cases_of(name)[0] for name in names]


OTHERS = (*(f"customer-{number}" for number in range(6)), None)


def assert_as_peft(outputs: "Sequence[RequestOutput]", cases: Sequence[Case]) -> None:
    for output, case in zip(outputs, cases, strict=True):
        assert tuple(output.outputs[0].token_ids) == case.expected.tokens, case.adapter


def _load_with_fault(manager: Any, victim: int, fault: str, request: Any) -> Any:
    if request.lora_int_id == victim:
        if fault == "hang":
            time.sleep(3 * TIMEOUT_S)
        elif fault == "thread dies":
            raise SystemExit
        elif fault == "no memory":
            raise MemoryError("cannot allocate the adapter")
        elif fault == "disk error":
            raise OSError(5, "Input/output error")
    return manager.tiers.reader.load(request)


def _inject(victim: int, fault: str, worker: Any) -> None:
    manager = worker.model_runner.lora_manager
    manager.tiers.loader._load = functools.partial(_load_with_fault, manager, victim, fault)
    manager.tiers.loader.forget(victim)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", f"longer than {TIMEOUT_S:g} s"),
        ("thread dies", "SystemExit"),
        ("no memory", "cannot allocate"),
        ("disk error", "Input/output error"),
    ],
)
def test_a_fault_ends_the_adapters_requests_and_no_others(
    engine: "LLM", fleet: Scenario, fault: str, reason: str
) -> None:
    victim = fleet.adapter_id(VICTIM)
    engine.llm_engine.remove_lora(victim)
    engine.collective_rpc(functools.partial(_inject, victim, fault))
    cases = cases_of(fleet, *OTHERS, VICTIM, *OTHERS, VICTIM)
    outputs = answer(engine, fleet, cases)
    failed = [o for o, case in zip(outputs, cases, strict=True) if case.adapter == VICTIM]
    for output in failed:
        completion = output.outputs[0]
        assert completion.finish_reason == "error"
        assert completion.token_ids == []
        assert VICTIM in completion.stop_reason
        assert reason in completion.stop_reason
    served = [(o, c) for o, c in zip(outputs, cases, strict=True) if c.adapter != VICTIM]
    assert_as_peft(*zip(*served, strict=True))
    engine.collective_rpc(functools.partial(_inject, victim, "none"))
    again = cases_of(fleet, VICTIM)
    assert_as_peft(answer(engine, fleet, again), again)


def _lose_silently(victim: int, path: str, worker: Any) -> None:
    """The host copy goes and the engine is not told, as if it had asked a moment too early."""
    manager = worker.model_runner.lora_manager
    say, manager.tiers._say = manager.tiers._say, lambda event: None
    manager.remove_adapter(victim)
    manager.tiers._say = say
    Path(path).rename(path + ".away")


def test_an_adapter_lost_behind_the_engines_back_never_answers_as_the_base(
    engine: "LLM", fleet: Scenario
) -> None:
    """The step runs without it, and its tokens are thrown away, cached prefixes included."""
    name = "customer-10"
    file = fleet.adapters[name] / "adapter_model.safetensors"
    first = cases_of(fleet, name)
    assert_as_peft(answer(engine, fleet, first), first)
    victim = fleet.adapter_id(name)
    engine.collective_rpc(functools.partial(_lose_silently, victim, str(file)))
    try:
        cases = cases_of(fleet, "customer-1", name, None)
        outputs = answer(engine, fleet, cases)
    finally:
        Path(f"{file}.away").rename(file)
    completion = outputs[1].outputs[0]
    assert (completion.finish_reason, completion.token_ids) == ("error", [])
    assert_as_peft([outputs[0], outputs[2]], [cases[0], cases[2]])
    time.sleep(2.5)  # a failure answers for a while
    assert_as_peft(answer(engine, fleet, first), first)
