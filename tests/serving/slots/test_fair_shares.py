"""Customers that compete share the engine by tokens, whoever came first and with however much."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from ..engine import greedy, lora_request, running_engine
from ..models.cases import NEW_TOKENS, Scenario

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

PLACES = 4
GREEDY, MODEST = "customer-0", "customer-1"
PROMPT = 11  # tokens of every case of the fleet
REQUEST_COST = PROMPT + 2 * NEW_TOKENS


class Engine:
    """An engine that does one step for each that it is asked to do; answers are PEFT's."""

    def __init__(self, llm: "LLM", fleet: Scenario) -> None:
        self._engine: Any = llm.llm_engine
        self._fleet = fleet
        self._asked = 0
        self.pending: Counter[str] = Counter()
        self.cost: Counter[str] = Counter()  # of what each has been given since `ask`
        self.finished: list[str] = []
        self._seen: dict[str, int] = {}

    def ask(self, name: str, requests: int) -> None:
        (case,) = self._fleet.cases_of(name)
        for _ in range(requests):
            self._asked += 1
            self.pending[name] += 1
            self._engine.add_request(
                f"{name} {self._asked}",
                {"prompt_token_ids": list(case.prompt)},
                greedy(),
                lora_request=lora_request(self._fleet, name),
            )

    def step(self) -> None:
        for output in self._engine.step():
            name = output.request_id.split()[0]
            tokens = tuple(output.outputs[0].token_ids)
            before = self._seen.get(output.request_id, 0)
            self.cost[name] += (PROMPT if not before else 0) + 2 * (len(tokens) - before)
            self._seen[output.request_id] = len(tokens)
            if output.finished:
                (case,) = self._fleet.cases_of(name)
                assert tokens == case.expected.tokens
                self.pending[name] -= 1
                self.finished.append(name)

    def run(self) -> None:
        for _ in range(5000):
            if not self.pending.total():
                return
            self.step()
        raise AssertionError(f"not answered: {self.pending}")


@pytest.fixture(scope="module")
def engine(fleet: Scenario) -> Iterator[Engine]:
    with running_engine(
        fleet.base,
        in_process=True,
        enable_prefix_caching=False,
        max_num_seqs=PLACES,
        max_loras=2,
        additional_config={"multilora": {"fair_shares": True}},
    ) as llm:
        engine = Engine(llm, fleet)
        for name in (GREEDY, MODEST):  # from here on both are in slots
            engine.ask(name, 1)
            engine.run()
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        for name in (GREEDY, MODEST):
            weights = (fleet.adapters[name] / "adapter_model.safetensors").stat().st_size
            kv_bytes = token_bytes(llm.llm_engine.vllm_config)
            cost = scheduler._reading_cost(fleet.adapter_id(name))
            assert cost == pytest.approx(2 * weights / (512 * kv_bytes), rel=0.1)
        # Beside the KV cache of a model so small, adapters are so large that shares would be of
        # what reading them costs; the tests here count tokens.
        scheduler._token_bytes = 0.0
        yield engine


def token_bytes(vllm_config: Any) -> int:
    """What a token takes of the KV cache, in float32."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    heads, layers = model.get_num_kv_heads(parallel), model.get_num_layers(parallel)
    return int(2 * heads * model.get_head_size() * layers * 4)


def test_whoever_sends_eight_times_the_requests_first_gets_no_more_while_both_wait(
    engine: Engine,
) -> None:
    engine.cost.clear()
    engine.finished.clear()
    engine.ask(GREEDY, 32)
    for _ in range(3):
        engine.step()
    greedy_before = engine.cost[GREEDY]
    engine.ask(MODEST, 4)
    while engine.pending[MODEST]:
        engine.step()
    # All its requests are answered when as many of the other's are, and those that ran already.
    ahead = Counter(engine.finished)[GREEDY]
    assert ahead <= PLACES + 4 + PLACES
    both = engine.cost[GREEDY] - greedy_before, engine.cost[MODEST]
    assert abs(both[0] - both[1]) <= PLACES * REQUEST_COST
    engine.run()


def test_requests_that_steps_leave_out_are_answered_right(engine: Engine) -> None:
    scheduler = engine._engine.engine_core.engine_core.scheduler
    scheduler._shares._idle.clear()  # neither has had anything lately
    scheduler._bound.allowance = 1.0  # half as much again as the other's, which is the least
    engine.ask(GREEDY, PLACES - 1)
    for _ in range(3):
        engine.step()
    engine.cost.clear()
    engine.ask(MODEST, 1)
    while not engine.cost[MODEST]:
        engine.step()
    steps: Counter[int] = Counter()
    while engine.pending[MODEST]:
        before = engine.cost.copy()
        engine.step()
        if engine.cost[MODEST] > before[MODEST]:
            steps[(engine.cost[GREEDY] - before[GREEDY]) // 2] += 1
    assert steps.keys() <= {0, 1, 2}  # what is left of a step is saved for the next one
    tokens = sum(count * number for count, number in steps.items())
    assert 3 <= tokens <= 1.5 * steps.total() + 1
    engine.run()
