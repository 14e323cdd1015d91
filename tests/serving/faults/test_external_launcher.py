"""`external_launcher` (torchrun): each worker has its own engine, and all take the same steps."""

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.attacks.poison import poisoned

from .. import template
from ..engine import answer, assert_others_as_peft, lora_request, running_engine, store_folder
from ..models.cases import Case, Scenario
from ..server import free_port

pytestmark = [pytest.mark.serving, pytest.mark.slow]

RANKS = 2
LIMIT_S = 240.0


def test_all_ranks_answer_as_peft_beside_adapters_that_fail(
    llama: Scenario, tmp_path: Path
) -> None:
    """With fewer slots, and less host memory, than adapters."""
    first, *_ = llama.adapters
    failing = {
        "poison": poisoned(llama.adapters[first], tmp_path / "poison", "float32"),
        "gone": tmp_path / "gone",
    }
    scenario = Scenario(llama.base, {**llama.adapters, **failing}, ())
    cases = [case for case in llama.cases if len(case.prompt) in (7, 40)]
    cases += [Case(name, case.prompt, case.expected) for name in failing for case in cases[:1]]
    launched = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(RANKS),
    }
    # vLLM's shared memory has the same name each time, and none can be made where a process that
    # was killed has left one.
    for left in Path("/dev/shm").glob("-tp:0-*-cpushm_*"):
        left.unlink()
    context = multiprocessing.get_context("spawn")
    with store_folder(), template.forked_processes():
        ranks = [
            context.Process(target=_run, args=(rank, launched, scenario, cases, [*failing]))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(LIMIT_S)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * RANKS


def _run(
    rank: int,
    launched: dict[str, str],
    scenario: Scenario,
    cases: Sequence[Case],
    failing: Sequence[str],
) -> None:
    os.environ.update(launched, RANK=str(rank), LOCAL_RANK=str(rank))
    with running_engine(
        scenario.base,
        in_process=True,
        tensor_parallel_size=RANKS,
        distributed_executor_backend="external_launcher",
        max_loras=2,
        max_cpu_loras=4,
    ) as llm:
        for _ in range(2):
            assert_others_as_peft(answer(llm, scenario, cases), cases, failing)
        request = lora_request(scenario, next(iter(scenario.adapters)))
        assert llm.llm_engine.add_lora(request)
        assert llm.llm_engine.remove_lora(request.lora_int_id)
