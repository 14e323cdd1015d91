"""Faults that no file can cause: hanging storage, dying checks, no memory, a worker's mistake."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE
from vllm_multilora.store.store_launch import StoreProcess

from ..engine import answer, assert_as_peft, running_engine, store_folder
from ..models.cases import Case, Scenario
from .faulty_reader import FAULT, FAULTY_READER

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

SLOTS = 3
TIMEOUT_S = 10.0  # a reader is a process that must get its turn on a busy machine
VICTIM = "customer-9"
OTHERS = (*(f"customer-{number}" for number in range(6)), None)


@pytest.fixture(scope="module")
def victim(fleet: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the victim's folder, for faults."""
    copy = tmp_path_factory.mktemp("faults") / VICTIM
    return Path(shutil.copytree(fleet.adapters[VICTIM], copy))


@pytest.fixture(scope="module")
def deployed(fleet: Scenario, victim: Path) -> Scenario:
    return Scenario(fleet.base, {**fleet.adapters, VICTIM: victim}, fleet.cases)


@pytest.fixture(scope="module")
def engine(fleet: Scenario) -> "Iterator[LLM]":
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv(FOLDER_VARIABLE, stack.enter_context(store_folder()))
        # The engine finds this store, and does not start one of its own.
        store = StoreClient(StoreProcess(FAULTY_READER), "tests", role="observer")
        stack.callback(store.close)
        settings = {"load_timeout_s": TIMEOUT_S}
        yield stack.enter_context(
            running_engine(
                fleet.base,
                in_process=True,
                max_loras=SLOTS,
                max_cpu_loras=SLOTS,
                additional_config={"multilora": settings},
            )
        )


def cases_of(fleet: Scenario, *names: str | None) -> list[Case]:
    return [fleet.cases_of(name)[0] for name in names]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", f"within {TIMEOUT_S:g} s"),
        ("die", "ended with code 3"),
        ("no memory", "cannot allocate"),
        ("disk error", "Input/output error"),
    ],
)
def test_a_fault_ends_the_adapters_requests_and_no_others(
    engine: "LLM", deployed: Scenario, victim: Path, fault: str, reason: str
) -> None:
    number = deployed.adapter_id(VICTIM)
    engine.llm_engine.remove_lora(number)
    (victim / FAULT).write_text(fault)
    cases = cases_of(deployed, *OTHERS, VICTIM, *OTHERS, VICTIM)
    outputs = answer(engine, deployed, cases)
    (victim / FAULT).unlink()
    failed = [o for o, case in zip(outputs, cases, strict=True) if case.adapter == VICTIM]
    for output in failed:
        completion = output.outputs[0]
        assert completion.finish_reason == "error"
        assert completion.token_ids == []
        assert VICTIM in completion.stop_reason
        assert reason in completion.stop_reason
    served = [(o, c) for o, c in zip(outputs, cases, strict=True) if c.adapter != VICTIM]
    assert_as_peft(*zip(*served, strict=True))
    engine.llm_engine.remove_lora(number)  # the failure would answer for a while
    again = cases_of(deployed, VICTIM)
    assert_as_peft(answer(engine, deployed, again), again)


def test_a_pipe_in_the_place_of_weights_is_refused_and_holds_nobody_up(
    engine: "LLM", deployed: Scenario, tmp_path: Path
) -> None:
    pipe = Path(shutil.copytree(deployed.adapters["customer-8"], tmp_path / "pipe"))
    (pipe / "adapter_model.safetensors").unlink()
    os.mkfifo(pipe / "adapter_model.safetensors")
    scenario = Scenario(deployed.base, {**deployed.adapters, "customer-8": pipe}, deployed.cases)
    cases = cases_of(deployed, *OTHERS, "customer-8")
    *served, refused = answer(engine, scenario, cases)
    assert_as_peft(served, cases[:-1])
    assert refused.outputs[0].finish_reason == "error"
    assert "adapter_model.safetensors" in refused.outputs[0].stop_reason


def _lose_silently(worker: Any) -> None:
    """The slots' owners are gone, and the engine core is not told."""
    manager = worker.model_runner.lora_manager
    manager.model_manager.empty_all_slots()
    manager._orders += 1  # so that the next step looks


def test_an_adapter_that_a_worker_has_lost_never_answers_as_the_base(
    engine: "LLM", deployed: Scenario
) -> None:
    """The step runs without it, and its tokens are thrown away, cached prefixes included."""
    name = "customer-10"
    cases = cases_of(deployed, name, None)
    assert_as_peft(answer(engine, deployed, cases), cases)
    engine.collective_rpc(_lose_silently)
    lost, base = answer(engine, deployed, cases)
    assert (lost.outputs[0].finish_reason, lost.outputs[0].token_ids) == ("error", [])
    assert_as_peft([base], cases[1:])
    assert_as_peft(answer(engine, deployed, cases), cases)  # and it is there again
