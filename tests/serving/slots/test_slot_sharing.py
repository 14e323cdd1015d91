"""More adapters with requests than slots: all are served, at about the same pace."""

import itertools
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import pytest

from vllm_multilora.states import AdapterState

from ..engine import greedy, lora_request, running_engine
from ..models.cases import NEW_TOKENS, Case, Scenario

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

SLOTS, ADAPTERS = 3, 6
REQUESTS_EACH = 30
MAX_STEPS = 20_000
"""Several times what a fair engine takes."""
MAX_IDLE_STEPS = 100_000
LONGEST_COPY_S = 60.0


@dataclass
class Pending:
    """A request in the engine, and the step in which it came."""

    case: Case
    step: int


class Stepper:
    """Drives an engine step by step and checks every answer; time is counted in steps.

    Steps, not seconds: what else the machine does must not matter.
    """

    def __init__(self, llm: "LLM", fleet: Scenario) -> None:
        self._engine: Any = llm.llm_engine
        self._fleet = fleet
        self._numbers = itertools.count()
        self._pending: dict[str, Pending] = {}
        self.step = self._idle = 0
        self.latencies: defaultdict[str | None, list[int]] = defaultdict(list)

    def pending(self, name: str) -> int:
        return sum(pending.case.adapter == name for pending in self._pending.values())

    def submit(self, name: str, new_tokens: int = NEW_TOKENS) -> None:
        (case,) = self._fleet.cases_of(name)
        request_id = f"{name}-{next(self._numbers)}"
        self._pending[request_id] = Pending(case, self.step)
        self._engine.add_request(
            request_id,
            {"prompt_token_ids": list(case.prompt)},
            greedy(max_tokens=new_tokens),
            lora_request=lora_request(self._fleet, name),
        )

    def run_step(self) -> None:
        outputs = self._engine.step()
        self._await_copies()
        # One without any waits for a copy into a slot, for as long as the machine takes.
        self.step += bool(outputs)
        self._idle = 0 if outputs else self._idle + 1
        assert self._idle < MAX_IDLE_STEPS
        for output in outputs:
            if output.finished:
                request = self._pending.pop(output.request_id)
                tokens = tuple(output.outputs[0].token_ids)
                assert tokens == request.case.expected.tokens[: len(tokens)]
                assert output.outputs[0].finish_reason == "length"
                self.latencies[request.case.adapter].append(self.step - request.step)

    def _await_copies(self) -> None:
        """A model's steps take longer than its adapters' copies; these steps need not."""
        adapters = self._engine.engine_core.engine_core.scheduler.adapters
        deadline = time.monotonic() + LONGEST_COPY_S
        while any(
            adapter is not None and adapters.state(adapter) is AdapterState.HOST
            for adapter in adapters.slots.contents
        ):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
            adapters.poll()


def test_adapters_that_share_slots_wait_alike(fleet: Scenario) -> None:
    """Every adapter has four requests at all times, a new one as soon as one is answered.

    They are of many lengths, so that an adapter with a slot hardly ever leaves it by itself.
    """
    lengths = random.Random(0)
    names = [f"customer-{number}" for number in range(ADAPTERS)]
    with running_engine(
        fleet.base,
        in_process=True,
        enable_prefix_caching=False,
        max_loras=SLOTS,
        max_cpu_loras=ADAPTERS,
    ) as llm:
        engine = Stepper(llm, fleet)
        for name in names:  # else some have turns while others are read
            engine.submit(name)
            while engine.pending(name):
                engine.run_step()
        engine.latencies.clear()
        while min(len(engine.latencies[name]) for name in names) < REQUESTS_EACH:
            for name in names:
                while engine.pending(name) < 4:
                    engine.submit(name, new_tokens=lengths.randint(1, NEW_TOKENS))
            engine.run_step()
            assert engine.step < MAX_STEPS, {n: len(engine.latencies[n]) for n in names}
    means = {name: mean(engine.latencies[name]) for name in names}
    assert max(means.values()) < 2 * min(means.values()), means
