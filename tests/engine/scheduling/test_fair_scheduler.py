"""Fair shares over vLLM's own schedulers: who is next, how much of a prompt, and what it costs."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from tests.engine.fake_engine import Engine, pack_info
from tests.engine.scheduling.real_scheduler import (
    BLOCK_SIZE,
    SCHEDULERS,
    TOKEN_BYTES,
    Steps,
    make_config,
)
from vllm_multilora.integration.engine.scheduling import fair_scheduler as fair_scheduler_module
from vllm_multilora.integration.engine.scheduling import scheduler as scheduler_module
from vllm_multilora.integration.engine.scheduling.fair_scheduler import (
    BASE_MODEL,
    FairSharesMixin,
    flow_of,
)
from vllm_multilora.slots.fairness.fair_shares import CONTEXT_TOKENS, GENERATED_COST, Flow
from vllm_multilora.slots.fairness.slot_turns import PATIENCE_STEPS

PLACES, STEP_TOKENS, LIMIT = 4, 256, 32
FLOW = ("adapter", "adapter-1")


class FixedBound:
    """As `StepBound`, without a clock: heavy flows may have LIMIT of each step."""

    def __init__(self, slowdown: float, most: int) -> None:
        self.took_part: list[float] = []
        self.least = 0.0

    def next(self, least: float) -> float:
        self.least = least
        return LIMIT

    def took(self, seconds: float, added: float) -> None:
        assert seconds > 0
        self.took_part.append(added)


@pytest.fixture(autouse=True)
def no_naps(monkeypatch):
    monkeypatch.setattr(scheduler_module, "_IDLE_S", 0.0)
    monkeypatch.setattr(scheduler_module, "engine_recorder", lambda config: None)
    monkeypatch.setattr(fair_scheduler_module, "StepBound", FixedBound)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    made: dict[tuple, VllmConfig] = {}

    def get(**options) -> VllmConfig:
        key = tuple(sorted(options.items()))
        if key not in made:
            folder: Path = tmp_path_factory.mktemp("model")
            given = {"places": PLACES, "step_tokens": STEP_TOKENS}
            made[key] = make_config(folder, **{"fair_shares": True} | given | options)
        return made[key]

    return get


@pytest.fixture(params=SCHEDULERS, ids=lambda base: base.__name__)
def steps(request, configs):
    return Steps(configs(), request.param)


def run(steps: Steps, count: int) -> Counter[str]:
    """Tokens of each request in so many steps."""
    tokens: Counter[str] = Counter()
    for _ in range(count):
        tokens.update(steps.step())
    return tokens


def of(tokens: Counter[str], flow: str) -> int:
    return sum(count for name, count in tokens.items() if name.startswith(flow))


def waiting(steps: Steps, flow: str) -> int:
    return sum(request.request_id.startswith(flow) for request in steps.scheduler.waiting)


@pytest.mark.parametrize("base", SCHEDULERS, ids=lambda base: base.__name__)
@pytest.mark.parametrize("fair", [True, False], ids=["fair", "unfair"])
def test_a_late_request_stands_before_a_flood_that_came_first(configs, base, fair):
    steps = Steps(configs(fair_shares=fair), base)
    for number in range(20):
        steps.ask(f"flood {number}", adapter=1)
    run(steps, 2)
    steps.ask("late", adapter=2)
    finished = steps.drain()
    if fair:
        assert finished.index("late") <= 2 * PLACES
    else:
        assert finished[-1] == "late"


def test_eight_equal_tenants_get_equal_shares(configs):
    """Jain's index of their tokens, while each always has as many requests of any length."""
    steps, lengths = Steps(configs(places=16)), Random(0)
    names, asked = "abcdefgh", Counter[str]()
    costs: Counter[str] = Counter()
    for _ in range(500):
        for name in names:
            while asked[name] - _ended(steps, f"{name} ") < 4:
                asked[name] += 1
                sizes = {"prompt": lengths.randint(16, 128), "generate": lengths.randint(10, 40)}
                steps.ask(f"{name} {asked[name]}", tenant=name, **sizes)
        for request, tokens in steps.step().items():
            costs[request.split()[0]] += tokens if tokens > 1 else 2
    total = costs.total()
    assert total**2 / (8 * sum(cost**2 for cost in costs.values())) > 0.995


def test_shares_are_by_weight(steps):
    for number in range(120):
        steps.ask(f"gold {number}", tenant="gold", weight=3.0)
        steps.ask(f"plain {number}", tenant="plain")
    tokens = run(steps, 80)
    assert waiting(steps, "gold")
    assert of(tokens, "gold") / of(tokens, "plain") == pytest.approx(3.0, rel=0.15)


def test_who_is_charged(steps):
    assert flow_of(steps.ask("a", tenant="acme", adapter=1)) == ("tenant", "acme")
    assert flow_of(steps.ask("b", adapter=1)) == ("adapter", "adapter-1")
    assert flow_of(steps.ask("c")) == BASE_MODEL


def test_a_long_prompt_takes_part_of_a_step_only_while_another_one_generates(steps):
    steps.ask("small", adapter=1, prompt=16, generate=20)
    run(steps, 3)
    steps.ask("long", adapter=2, prompt=1800, generate=4)
    parts = []
    while "small" in (step := steps.step()):
        parts.append(step.get("long", 0))
    # In the step with its first piece it has had nothing yet.
    assert parts[0] > LIMIT
    assert set(parts[1:]) == {LIMIT}
    assert max(steps.step().get("long", 0) for _ in range(3)) == STEP_TOKENS  # alone


def test_a_small_requests_prompt_stands_before_the_rest_of_a_long_one(steps):
    steps.ask("long", adapter=2, prompt=1500, generate=4)
    run(steps, 2)
    steps.ask("small", adapter=1, prompt=200)
    step = steps.step()
    assert step["small"] == 200
    assert step["long"] == LIMIT


def test_adapters_of_requests_that_a_step_leaves_out_keep_their_slots(configs):
    """Else a later step has more adapters than there are slots, which ends the engine."""
    steps = Steps(configs(places=16, max_loras=3))
    steps.ask("small", adapter=1, prompt=16, generate=100)
    run(steps, 2)
    for number in (2, 3):
        steps.ask(f"long {number}", adapter=number, prompt=1000)
    run(steps, 3)  # both have begun, and one of them has all that there is for both
    steps.ask("fourth", adapter=4, prompt=16)
    assert "fourth" not in run(steps, 5)
    steps.drain()


def test_running_requests_of_a_heavy_flow_take_part_of_a_step_only(configs):
    """The requests that came first go on, so that each ends in its turn."""
    steps = Steps(configs(places=40))
    for number in range(30):
        steps.ask(f"large {number:2}", adapter=2, generate=60)
    run(steps, 20)
    steps.ask("small", adapter=1, generate=200)
    run(steps, 3)
    seen: list[str] = []
    while of(step := steps.step(), "large") and "small" in step:
        names = [name for name in step if name.startswith("large")]
        assert len(names) <= LIMIT // 2
        seen += names
    assert list(dict.fromkeys(seen)) == [f"large {number:2}" for number in range(30)]
    assert Counter(seen).total() > 30 * 30


def test_a_step_looks_at_few_requests_of_a_heavy_flow_that_may_have_no_more_of_it(configs):
    """There may be tens of thousands, and each look at one takes everybody time."""
    steps = Steps(configs(places=250))
    for number in range(30):
        steps.ask(f"large {number:3}", tenant="large", adapter=2 + number % 4, generate=60)
    run(steps, 20)
    steps.ask("small", adapter=1, generate=200)
    run(steps, 3)
    for number in range(30, 230):
        steps.ask(f"large {number:3}", tenant="large", adapter=2 + number % 4)
    looked, look = [], steps.scheduler._handle_blocked_waiting_request
    steps.scheduler._handle_blocked_waiting_request = lambda r: looked.append(r) or look(r)
    tokens = run(steps, 10)
    assert tokens["small"] == 10
    assert (left := waiting(steps, "large")) > 100
    assert len(looked) <= 10 + 200 - left
    assert len(steps.drain()) >= left


def test_a_step_looks_at_one_of_those_that_wait_for_their_grammars(configs):
    """One call may want thousands of answers, and a grammar may take minutes."""
    steps = Steps(configs(places=250))
    steps.ask("small", adapter=1, generate=200)
    grammars: list[Future[None]] = [Future() for _ in range(100)]
    for number, grammar in enumerate(grammars):
        steps.ask(f"large {number:2}", adapter=2, grammar=grammar)
    looked, look = [], steps.scheduler._handle_blocked_waiting_request
    steps.scheduler._handle_blocked_waiting_request = lambda r: looked.append(r) or look(r)
    assert run(steps, 10)["small"] >= 10
    assert len(looked) == 10 + 1
    grammars[70].set_exception(ValueError("no grammar"))
    run(steps, 2)
    assert steps.finished == ["large 70"]
    assert waiting(steps, "large") == 99
    steps.abort(*(f"large {number:2}" for number in range(100)))
    assert steps.drain()[-1] == "small"


@pytest.mark.parametrize("base", SCHEDULERS, ids=lambda base: base.__name__)
def test_a_requests_next_token_and_its_drafts_are_in_one_step_or_in_a_later_one(configs, base):
    """A waiting request with one token to compute comes with room for drafts, in vLLM's steps."""
    drafts = 4
    steps = Steps(configs(places=16, drafts=drafts), base)
    steps.ask("small", adapter=1, generate=200)
    for number in range(30):
        steps.ask(f"large {number}", adapter=2, prompt=1, generate=20)
    run(steps, 5)
    left_out = 0
    while of(step := Counter(steps.step()), "large") and "small" in step:
        parts = [tokens for name, tokens in step.items() if name.startswith("large")]
        assert set(parts) <= {1, 1 + drafts}
        left_out += sum(r.request_id not in step for r in steps.scheduler.running)
    assert left_out > 0
    assert len(steps.drain()) == 31


@pytest.mark.parametrize("base", SCHEDULERS, ids=lambda base: base.__name__)
def test_requests_that_steps_leave_out_have_all_their_tokens_in_the_end(configs, base):
    steps = Steps(configs(places=40), base)
    asked = [steps.ask(f"large {number}", adapter=2, generate=30) for number in range(30)]
    asked.append(steps.ask("small", adapter=1, generate=300))
    steps.drain()
    assert [len(request.output_token_ids) for request in asked] == [30] * 30 + [300]


def test_steps_in_which_others_generate_are_timed(configs):
    steps = Steps(configs())
    steps.ask("small", adapter=1, prompt=16, generate=30)
    run(steps, 2)
    steps.ask("long", adapter=2, prompt=600, generate=4)
    run(steps, 1)
    assert not steps.scheduler._bound.took_part  # nobody was heavy yet
    run(steps, 5)
    assert steps.scheduler._bound.took_part == [LIMIT] * 5
    steps.ask("small too", adapter=1, prompt=16, generate=3)
    run(steps, 1)
    assert len(steps.scheduler._bound.took_part) == 5  # a prompt of others, of any length


def test_nobody_is_held_back_for_one_that_finds_no_place(configs):
    steps = Steps(configs(places=20))
    for number in range(20):
        steps.ask(f"large {number}", adapter=2, generate=40)
    run(steps, 4)
    steps.ask("small", adapter=1)
    for _ in range(5):
        assert of(Counter(steps.step()), "large") == 20


def test_nobody_is_held_back_for_one_that_finds_no_memory(configs):
    steps = Steps(configs(places=30), blocks=27)
    for number in range(24):
        steps.ask(f"large {number}", adapter=2, generate=14, prompt=1)
    run(steps, 4)
    steps.ask("small", adapter=1, prompt=100)
    run(steps, 1)
    for _ in range(5):
        assert of(Counter(steps.step()), "large") == 24


def test_heavy_flows_have_a_share_by_their_weights_however_long_steps_take(configs):
    steps = Steps(configs(places=8))
    for number in range(4):
        steps.ask(f"large {number}", tenant="large", weight=3.0, generate=400)
    run(steps, 20)
    steps.ask("small", tenant="small", generate=200)
    run(steps, 10)
    assert steps.scheduler._bound.least == 1.5 * 3.0 * GENERATED_COST


def test_equal_flows_are_not_limited(steps):
    for number in range(2):
        steps.ask(f"{number}", adapter=number + 1, prompt=600, generate=20)
    # From the second on both have had a step's worth at least.
    totals = [sum(steps.step().values()) for _ in range(4)]
    assert totals[0] == totals[1] == totals[2] == STEP_TOKENS


def test_prompts_that_vllm_does_not_divide_are_not_limited(configs):
    steps = Steps(configs(chunked=False, step_tokens=512))
    steps.ask("small", adapter=1, generate=40)
    run(steps, 3)
    for number in range(2):
        steps.ask(f"long {number}", adapter=2, prompt=300, generate=20)
    run(steps, 4)
    assert {"small", "long 0", "long 1"} <= {r.request_id for r in steps.scheduler.running}


@pytest.mark.parametrize("base", SCHEDULERS, ids=lambda base: base.__name__)
def test_alone_a_flow_is_scheduled_as_without_fair_shares(configs, base):
    fair, unfair = (Steps(configs(fair_shares=fair), base, blocks=60) for fair in (True, False))
    numbers = Random(0)
    for number in range(200):
        if numbers.random() < 0.4:
            sizes = {"prompt": numbers.randint(1, 300), "generate": numbers.randint(1, 30)}
            for steps in (fair, unfair):
                steps.ask(f"{number}", adapter=1, **sizes)
        assert fair.step() == unfair.step()
    assert fair.scheduler._shares.served(FLOW) == 0  # nothing was counted


@pytest.mark.parametrize("base", SCHEDULERS, ids=lambda base: base.__name__)
def test_who_has_had_most_is_preempted_and_charged_once(configs, base):
    steps = Steps(configs(), base, blocks=24)
    for number in range(3):
        steps.ask(f"large {number}", adapter=1, prompt=90, generate=40)
    run(steps, 3)
    steps.ask("small", adapter=2, prompt=20, generate=40)
    preempted: set[str] = set()
    before = steps.scheduler._shares.served(FLOW)
    computed = {r.request_id: r.num_computed_tokens for r in steps.scheduler.running}
    while "small" in steps.scheduler.requests:
        steps.step()
        preempted |= {r.request_id for r in steps.scheduler.requests.values() if r.num_preemptions}
    assert preempted
    assert "small" not in preempted
    charged = steps.scheduler._shares.served(FLOW) - before
    at_most = sum(90 - min(90, computed.get(f"large {n}", 0)) + 2 * 40 for n in range(3))
    assert charged <= at_most


def test_what_is_computed_again_after_two_preemptions_is_charged_once(configs, monkeypatch):
    steps = Steps(configs())
    steps.ask("other", adapter=2, generate=200)
    request = steps.ask("flow", adapter=1, prompt=400, generate=2)
    while request.num_computed_tokens < 300:
        steps.step()
    charged, computed = Counter[tuple](), request.num_computed_tokens
    monkeypatch.setattr(
        steps.scheduler._shares, "charge", lambda flow, cost: charged.update({flow: cost})
    )
    for _ in range(2):
        steps.scheduler.running.remove(request)
        steps.scheduler._preempt_request(request, 0.0)
        steps.step()
    assert 0 < request.num_computed_tokens < computed
    while request.num_computed_tokens < computed:
        steps.step()
    assert charged[FLOW] == pytest.approx(request.num_computed_tokens - computed, abs=1)


def test_a_session_that_waits_for_input_holds_up_nobodys_prompts(configs):
    steps = Steps(configs())
    session = steps.ask("session", adapter=1, generate=2, resumable=True)
    while session.status is not RequestStatus.WAITING_FOR_STREAMING_REQ:
        steps.step()
    steps.ask("long", adapter=2, prompt=1800)
    parts = [steps.step()["long"] for _ in range(6)]
    assert parts.count(STEP_TOKENS) >= len(parts) - 1
    steps.ask("session", adapter=1, prompt=10, generate=2, resumable=True)
    step = steps.step()
    assert step["session"] == 10
    assert len(steps.scheduler._flows) == 2


def test_input_for_a_session_that_has_ended_while_its_blocks_are_sent_is_no_matter(configs):
    """A KV connector sends them on, and vLLM keeps the request until then."""
    steps = Steps(configs())
    session = steps.ask("session", adapter=1, resumable=True)
    steps.step()
    steps.scheduler._connector_finished = lambda request: (True, None)
    steps.abort("session")
    steps.ask("session", adapter=1, resumable=True)
    assert session.is_finished()
    assert not steps.scheduler._flows


def test_priorities_are_left_as_they_are(configs):
    steps = Steps(configs(policy="priority"))
    assert not isinstance(steps.scheduler, FairSharesMixin)
    for number in range(12):
        steps.ask(f"flood {number}", adapter=1, priority=-1)
    steps.ask("late", adapter=2, priority=0)
    assert steps.drain()[-1] == "late"


def test_fair_shares_need_a_scheduler_that_asks_how_much_to_compute(configs, caplog, monkeypatch):
    monkeypatch.delattr(Scheduler, "_reserve_prefill_lookahead")

    class Another(Scheduler):
        pass

    with caplog.at_level("WARNING"):
        steps = Steps(configs(), Another)
    assert not isinstance(steps.scheduler, FairSharesMixin)
    assert "Fair shares are off: Another" in caplog.text


class Slots:
    """A store and workers that have done everything that they were asked, at once.

    Args:
        steps: Of the scheduler.
        slots: How many there are.
        costs: Of reading an adapter's weights, by its number; else as good as nothing.
    """

    def __init__(self, steps: Steps, slots: int, costs: Mapping[int, float] | None = None) -> None:
        self.costs = costs or {}
        self.engine = Engine(slots, ranks=1)
        self.steps = steps
        steps.scheduler._slots = slots
        steps.scheduler.attach_adapters(self.engine.adapters)

    def step(self) -> dict[str, int]:
        for load_request in list(self.engine.store.load_requests.values()):
            cost = self.costs.get(load_request.adapter, 0.01)
            nbytes = round(cost / GENERATED_COST * CONTEXT_TOKENS * TOKEN_BYTES)
            pack = msgspec.structs.replace(pack_info(load_request.adapter), nbytes=nbytes)
            self.engine.store.loaded(pack, load_request)
        for order in list(self.engine.workers.orders):
            self.engine.workers.filled(order)
        return self.steps.step()


@pytest.mark.parametrize(
    ("reading", "generated"),
    [
        pytest.param(0.01, 160, id="small"),
        pytest.param(16, 40 * LIMIT // (16 + 2), id="large"),
        pytest.param(64, 40 * LIMIT // (64 + 2), id="larger than what a step has for all"),
    ],
)
def test_large_adapters_are_in_no_more_steps_than_they_may_add_to(configs, reading, generated):
    """One request each of four, beside one that is in every step."""
    large = range(2, 6)
    steps = Steps(configs(places=8))
    slots = Slots(steps, slots=8, costs=dict.fromkeys(large, reading))
    steps.ask("small", adapter=1, generate=200)
    for number in large:
        steps.ask(f"large {number}", adapter=number, generate=200)
    for _ in range(20):
        slots.step()
    tokens: Counter[str] = Counter()
    for _ in range(40):
        step = slots.step()
        assert "small" in step
        tokens.update(step)
    of_large = [tokens[f"large {number}"] for number in large]
    assert sum(of_large) == pytest.approx(generated, abs=2)
    assert max(of_large) - min(of_large) <= 2, "they take turns"


def test_what_was_saved_beside_somebody_is_nobodys_when_that_one_has_gone(configs):
    steps = Steps(configs(places=8))
    slots = Slots(steps, slots=8, costs={2: 64})
    steps.ask("small", adapter=1, generate=200)
    steps.ask("large", adapter=2, generate=200)
    while not steps.scheduler._saved:
        slots.step()
    steps.scheduler._bound.next = lambda least: 0.0
    assert slots.step().keys() == {"small"}  # a step that is the others' alone
    assert steps.scheduler._saved
    steps.abort("small")
    slots.step()
    assert not steps.scheduler._saved


def test_requests_of_an_adapter_pay_once_for_reading_it(configs):
    steps = Steps(configs(places=8))
    slots = Slots(steps, slots=8, costs={2: 16})
    steps.ask("small", adapter=1, generate=200)
    for number in range(5):
        steps.ask(f"large {number}", adapter=2, generate=200)
    for _ in range(20):
        slots.step()
    shares, flow = steps.scheduler._shares, ("adapter", "adapter-2")
    before = shares.served(flow)
    step = slots.step()
    assert of(Counter(step), "large") == 5
    assert shares.served(flow) - before == pytest.approx(16 + 5 * 2)


def test_a_tenant_with_many_adapters_has_no_more_of_the_slots(configs):
    """Two slots; every adapter always has requests of many lengths, as many as another."""
    steps = Steps(configs(places=8))
    slots = Slots(steps, slots=2)
    lengths, asked, served = Random(0), Counter[int](), Counter[str]()
    for _ in range(1500):
        for adapter in range(1, 8):
            tenant = "one" if adapter == 1 else "many"
            while asked[adapter] - _ended(steps, f"{tenant} {adapter} ") < 3:
                asked[adapter] += 1
                name = f"{tenant} {adapter} {asked[adapter]}"
                steps.ask(name, tenant=tenant, adapter=adapter, generate=lengths.randint(1, 20))
        served.update(name.split()[0] for name in slots.step())
    share = served["one"] / served.total()
    assert share == pytest.approx(0.45, abs=0.1)  # and 1 / 7 by adapters


def test_an_adapter_gets_its_turn_for_a_slot_beside_a_heavy_flow(configs):
    steps = Steps(configs(places=8))
    slots = Slots(steps, slots=1)
    steps.ask("small", generate=400)
    for number in range(100):
        steps.ask(f"large {number}", adapter=2, generate=60)
    for _ in range(20):
        slots.step()
    steps.ask("late", adapter=3)
    for _ in range(200):
        slots.step()
    assert "late" in steps.finished
    assert len(steps.finished) < 100


def test_an_adapter_gets_its_slot_in_the_turn_of_the_tenant_that_has_had_least(configs):
    steps = Steps(configs(places=8))
    slots = Slots(steps, slots=1)
    steps.ask("running", tenant="running", adapter=1, generate=PATIENCE_STEPS + 10)
    for _ in range(3):
        slots.step()
    for tenant, adapter in (("rich", 2), ("poor", 2), ("middle", 3)):
        steps.ask(tenant, tenant=tenant, adapter=adapter)
        slots.step()
    for tenant, served in (("rich", 1000.0), ("middle", 500.0)):
        steps.scheduler._shares.charge(("tenant", tenant), served)
    while steps.scheduler.requests:
        slots.step()
    assert steps.finished[:2] == ["running", "poor"]


def test_a_session_gets_a_slot_again_beside_those_that_always_have_requests(configs):
    """It holds blocks, and so it waits in a queue of vLLM's."""
    steps = Steps(configs(places=8))
    slots = Slots(steps, slots=1)
    session = steps.ask("session", adapter=1, generate=2, resumable=True)
    while session.status is not RequestStatus.WAITING_FOR_STREAMING_REQ:
        slots.step()
    for number in range(100):
        steps.ask(f"other {number}", adapter=2 + number % 2, generate=20)
    slots.step()
    steps.ask("session", adapter=1, prompt=10, generate=2, resumable=True)
    while session.status is not RequestStatus.WAITING_FOR_STREAMING_REQ:
        slots.step()
        assert len(steps.finished) < 50, "others go before it, however many there are"


def test_only_those_that_lack_nothing_but_a_slot_wait_because_of_others(configs, monkeypatch):
    steps = Steps(configs(places=8))
    slots = Slots(steps, slots=1)
    steps.ask("running", tenant="running", adapter=1, generate=100)
    steps.ask("slot", tenant="slot", adapter=2, inplace=True)
    for _ in range(5):
        slots.step()
    steps.ask("grammar", tenant="grammar", adapter=2, grammar=Future())
    steps.ask("reload", tenant="reload", adapter=2, inplace=True)
    steps.ask("load", tenant="load", adapter=3)
    waits_for_slot: dict[str, bool] = {}

    def hold(flow: Flow, **why: bool) -> None:
        waits_for_slot[flow[1]] = why["waits_for_slot"]

    monkeypatch.setattr(steps.scheduler._shares, "hold", hold)
    steps.step()  # in which the store says nothing
    assert waits_for_slot == {"slot": True, "reload": False, "grammar": False, "load": False}


@pytest.mark.parametrize("tenants", [2, 50])
def test_a_step_looks_at_few_of_thousands_of_adapters_that_wait(configs, tenants):
    """Nothing has come for them, or others have all slots."""
    slots, adapters = 8, 2000
    steps = Steps(configs(places=64, max_loras=slots))
    engine = Slots(steps, slots)
    for number in range(slots):
        tenant = f"{number % tenants}"
        steps.ask(f"running {number}", tenant=tenant, adapter=1 + number, generate=90)
    for _ in range(5):
        engine.step()
    for number in range(adapters):
        steps.ask(f"waiting {number}", tenant=f"{number % tenants}", adapter=100 + number)
    steps.step()  # the store says nothing
    assert _calls(steps.step) < 20 * adapters
    engine.step()
    for _ in range(PATIENCE_STEPS):
        steps.step()
    assert len(steps.scheduler.running) == slots
    assert _calls(steps.step) < 20 * adapters


def _calls(act: Callable[[], object]) -> int:
    """How many functions are called."""
    events: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, argument: events.update((event,)))
    try:
        act()
    finally:
        sys.setprofile(None)
    return events["call"] + events["c_call"]


def _ended(steps: Steps, beginning: str) -> int:
    return sum(name.startswith(beginning) for name in steps.finished)


def test_one_whose_adapter_is_loading_holds_up_nobodys_prompts(configs):
    steps = Steps(configs())
    slots = Slots(steps, slots=4)
    steps.ask("long", adapter=2, prompt=1900)
    for _ in range(3):
        slots.step()
    cold = steps.ask("cold", adapter=1)
    parts = [steps.step()["long"] for _ in range(4)]  # the store says nothing
    assert parts.count(STEP_TOKENS) >= 3
    for _ in range(12):
        slots.step()
    assert cold.num_output_tokens


TRAFFIC = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(1, 400),
        st.integers(1, 12),
        st.integers(0, 3),
        st.booleans(),
    ),
    max_size=25,
)


@pytest.mark.parametrize("base", SCHEDULERS, ids=lambda base: base.__name__)
@settings(max_examples=15, deadline=None)
@given(traffic=TRAFFIC, blocks=st.sampled_from([40, 10_000]), drafts=st.sampled_from([0, 4]))
def test_no_step_idles_and_every_request_ends(configs, base, traffic, blocks, drafts):
    """Whatever comes, is aborted or preempted: places are taken, and nothing is left at the end."""
    steps = Steps(configs(drafts=drafts), base, blocks=blocks)
    names: list[str] = []
    for number, (flow, prompt, generate, pause, aborts) in enumerate(traffic):
        names.append(f"{flow} {number}")
        steps.ask(names[-1], tenant=flow, prompt=prompt, generate=generate)
        for _ in range(pause):
            step = steps.step()
            if steps.leaves_a_place and blocks > 40:
                # The step is full, or has all that heavy flows may have of it.
                assert sum(step.values()) >= LIMIT // 2 - drafts
        if aborts:
            steps.abort(names[number // 2])
    steps.drain()
    assert len(steps.scheduler.waiting) == 0
    assert not steps.scheduler._flows
    assert not steps.scheduler._computed
    assert not steps.scheduler._shares._working


def test_prompt_tokens_in_the_prefix_cache_are_free(configs):
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    steps = Steps(configs(prefix_caching=True))
    steps.ask("other", adapter=2, generate=200, block_hasher=hasher)
    # All prompts of one flow are the same, and it is never without a request.
    steps.ask("flow", adapter=1, generate=200, block_hasher=hasher)
    run(steps, 3)
    charged = []
    for name in ("first", "second"):
        before = steps.scheduler._shares.served(FLOW)
        steps.ask(name, adapter=1, prompt=160, generate=1, first_token=0, block_hasher=hasher)
        run(steps, 2)
        assert name in steps.finished
        charged.append(steps.scheduler._shares.served(FLOW) - before)
    of_the_other = 2 * 2
    assert charged == [160 + of_the_other, BLOCK_SIZE + of_the_other]
