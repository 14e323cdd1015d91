"""Steps take the same requests, whether or not they look at all that wait."""

import contextlib
from collections.abc import Iterable
from functools import cache
from random import Random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.engine.fake_engine import Engine, lora, pack_info
from tests.engine.scheduling.real_scheduler import Steps, make_config
from tests.engine.scheduling.test_fair_scheduler import FixedBound
from vllm_multilora.integration.engine.scheduling import fair_scheduler as fair_scheduler_module
from vllm_multilora.integration.engine.scheduling import scheduler as scheduler_module
from vllm_multilora.slots.pins import PinLimitError

ADAPTERS = 6
EVENTS = {"ask": 8, "step": 8, "load": 6, "fill": 6, "abort": 1, "evict": 1} | dict.fromkeys(
    ("pin", "register", "remove", "restart", "give_back"), 0.3
)
"""What happens, and how often."""


class Run:
    """An engine whose store and workers do what the test says.

    Args:
        config: Of the engine.
        looks_again: Whether each step asks for all adapters that requests wait for.
    """

    def __init__(self, config: Any, *, looks_again: bool) -> None:
        self.engine = Engine(config.lora_config.max_loras, ranks=1)
        self.steps = Steps(config)
        self.scheduler = self.steps.scheduler
        self.scheduler.attach_adapters(self.engine.adapters)
        if looks_again:
            self.scheduler._blocked.begin_step = self.ask_for_all
        self.requests = 0

    def ask_for_all(self, adapters: Any) -> None:
        self.scheduler._blocked.numbers.clear()
        self.scheduler._blocked.unready.clear()

    def seen(self) -> tuple[list, ...]:
        """All that can be seen of it."""
        return (
            [request.request_id for request in self.scheduler.waiting],
            [request.request_id for request in self.scheduler.running],
            list(self.steps.finished),
            list(self.engine.store.load_requests.values()),
            list(self.engine.workers.sent),
        )

    # What happens; chance decides alike for both engines

    def ask(self, chance: Random) -> None:
        self.requests += 1
        adapter = chance.randint(0, ADAPTERS)
        self.steps.ask(
            f"request {self.requests}",
            adapter=adapter or None,
            tenant=chance.choice([None, "one", "another"]),
            generate=chance.randint(1, 40),
            inplace=adapter > 0 and chance.random() < 0.1,
            priority=chance.randint(0, 2),
        )

    def step(self, chance: Random) -> None:
        """Steps; perhaps the store and the workers answer everything before each of them."""
        is_answered = chance.random() < 0.3
        for _ in range(chance.randint(1, 20)):
            if is_answered:
                self.engine.answer()
            self.steps.step()

    def load(self, chance: Random) -> None:
        for load_request in _one_of(self.engine.store.load_requests.values(), chance):
            if chance.random() < 0.1:
                self.engine.store.failed(load_request)
            else:
                pack = load_request.adapter + 10 * (load_request.fresh and chance.randint(0, 1))
                self.engine.store.loaded(pack_info(pack), load_request)

    def fill(self, chance: Random) -> None:
        workers = self.engine.workers
        for order in _one_of(workers.orders, chance):
            (workers.refused if chance.random() < 0.1 else workers.filled)(order)

    def abort(self, chance: Random) -> None:
        names = _one_of(self.scheduler.requests, chance)
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

    def pin(self, chance: Random) -> None:
        with contextlib.suppress(PinLimitError, ValueError):
            self.engine.adapters.pin(chance.randint(1, ADAPTERS))

    def register(self, chance: Random) -> None:
        request = lora(chance.randint(1, ADAPTERS), path="/nowhere", inplace=chance.random() < 0.5)
        self.engine.adapters.register(request)

    def remove(self, chance: Random) -> None:
        number = chance.randint(1, ADAPTERS)
        if not self.scheduler.users[number]:
            self.engine.adapters.remove(number)
            self.engine.store.forgets()

    def evict(self, chance: Random) -> None:
        number = chance.randint(1, ADAPTERS)
        if not self.engine.store.leases[number]:
            self.engine.store.evict(number)

    def restart(self, chance: Random) -> None:
        self.engine.restart_store()

    def give_back(self, chance: Random) -> None:
        self.engine.adapters.yield_host_memory()


def _one_of(there: Iterable[Any], chance: Random) -> list[Any]:
    found = list(there)
    return [chance.choice(found)] if found else []


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    @cache
    def get(policy: str, fair: bool) -> Any:
        folder = tmp_path_factory.mktemp("model")
        return make_config(
            folder, places=8, step_tokens=64, max_loras=2, policy=policy, fair_shares=fair
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "_IDLE_S", 0.0)
        patch.setattr(scheduler_module, "_LEASE_S", 0.0)
        patch.setattr(scheduler_module, "engine_recorder", lambda config: None)
        patch.setattr(fair_scheduler_module, "StepBound", FixedBound)  # else time decides
        yield get


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("policy", "fair"), [("fcfs", True), ("fcfs", False), ("priority", False)])
def test_what_a_step_does_not_look_at_could_not_have_run(configs, policy, fair, seed):
    config = configs(policy, fair)
    runs = [Run(config, looks_again=looks_again) for looks_again in (False, True)]
    events = Random(seed).choices([*EVENTS], [*EVENTS.values()], k=400)
    for number, event in enumerate(events):
        for run in runs:
            getattr(run, event)(Random(seed * 1000 + number))
        assert runs[0].seen() == runs[1].seen()
    assert len(runs[0].steps.finished) > 50
