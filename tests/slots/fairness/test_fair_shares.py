"""Flows get the same of the engine, whatever they ask for, and nobody earns credit by waiting."""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_multilora.slots.fairness import fair_shares
from vllm_multilora.slots.fairness.fair_shares import (
    CONTEXT_TOKENS,
    GENERATED_COST,
    HALF_LIFE_STEPS,
    HEAVY_RATIO,
    HELD_STEPS,
    MAX_REMEMBERED,
    PROMPT_COST,
    FairShares,
    cost_of,
    reading_cost,
)

STEP_TOKENS = 32


def joined(*flows: str) -> FairShares:
    """Shares of flows that each have a request for each time they are named."""
    shares = FairShares()
    for flow in flows:
        shares.join(flow)
    return shares


def begin_step(shares: FairShares) -> None:
    """A step in which everybody wants more."""
    shares.begin_step(shares.ranks())


@dataclass
class Request:
    flow: str
    prompt: int
    generate: int
    computed: int = 0

    @property
    def cost(self) -> float:
        return self.prompt * PROMPT_COST + self.generate * GENERATED_COST


@dataclass
class Engine:
    """As vLLM's scheduler with fair shares: running requests go on, then waiting ones come in."""

    places: int = 4
    weights: dict[str, float] = field(default_factory=dict)
    shares: FairShares = field(default_factory=FairShares)
    waiting: defaultdict[str, deque[Request]] = field(default_factory=lambda: defaultdict(deque))
    running: list[Request] = field(default_factory=list)
    had: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def ask(self, flow: str, prompt: int = 4, generate: int = 4) -> None:
        self.shares.join(flow, self.weights.get(flow, 1.0))
        self.waiting[flow].append(Request(flow, prompt, generate))

    def backlog(self, flow: str, numbers: Random, most: int = STEP_TOKENS) -> None:
        """The flow has requests waiting, of any length."""
        while len(self.waiting[flow]) < self.places + 1:
            self.ask(flow, numbers.randint(1, most), numbers.randint(1, 12))

    def step(self) -> set[str]:
        """Schedules and computes a step; the flows that something was computed for."""
        self.shares.begin_step({flow for flow, queue in self.waiting.items() if queue})
        budget, charges = STEP_TOKENS, defaultdict(float)

        def compute(request: Request) -> None:
            nonlocal budget
            begin = request.computed
            left = max(1, request.prompt - begin)
            request.computed += min(left, budget)
            budget -= request.computed - begin
            charges[request.flow] += cost_of(request.prompt, begin, request.computed)

        for request in self.running:
            if budget:
                compute(request)
        expected = defaultdict(float)
        while budget and len(self.running) < self.places and any(self.waiting.values()):
            flow = min(
                (p for p, queue in self.waiting.items() if queue),
                key=lambda p: (self.shares.served(p) + expected[p], p),
            )
            request = self.waiting[flow].popleft()
            expected[flow] += self.shares.worth(flow, request.prompt * PROMPT_COST)
            self.running.append(request)
            compute(request)
        for flow, cost in charges.items():
            self.shares.charge(flow, cost)
            self.had[flow] += cost
        ended = [r for r in self.running if r.computed >= r.prompt + r.generate]
        self.running = [r for r in self.running if r not in ended]
        for request in ended:
            self.shares.leave(request.flow)
        return set(charges)


WEIGHTS = st.sampled_from([0.5, 1.0, 2.0, 3.0])


@settings(max_examples=60, deadline=None)
@given(places=st.integers(1, 6), one=WEIGHTS, two=WEIGHTS, seed=st.integers(0, 2**32))
def test_two_flows_with_requests_waiting_get_shares_by_weight(places, one, two, seed):
    """However long and many each one's requests are, the difference does not grow."""
    numbers = Random(seed)
    engine = Engine(places, {"one": one, "two": two})
    bound = places * (STEP_TOKENS * PROMPT_COST + 13 * GENERATED_COST) / min(one, two)
    for _ in range(300):
        engine.backlog("one", numbers)
        engine.backlog("two", numbers, most=4)
        engine.step()
        assert abs(engine.had["one"] / one - engine.had["two"] / two) <= 2 * bound
    assert engine.had["one"] + engine.had["two"] >= 300  # and something was computed in each step


@settings(max_examples=60, deadline=None)
@given(
    traffic=st.lists(
        st.lists(
            st.tuples(st.sampled_from("abcde"), st.integers(1, 80), st.integers(1, 8)), max_size=3
        ),
        max_size=40,
    ),
    places=st.integers(1, 4),
)
def test_every_request_is_served_in_the_end(traffic, places):
    engine = Engine(places)
    for arrivals in traffic:
        for arrival in arrivals:
            engine.ask(*arrival)
        engine.step()
    for _ in range(20_000):
        if not engine.running and not any(engine.waiting.values()):
            break
        assert engine.step()
    assert not engine.shares.is_contended
    assert not any(engine.waiting.values())


@settings(max_examples=40, deadline=None)
@given(others=st.integers(1, 5), seed=st.integers(0, 2**32), places=st.integers(1, 3))
def test_nobody_starves_beside_flows_that_never_stop_asking(others, seed, places):
    numbers, engine = Random(seed), Engine(places)
    names = [f"other {number}" for number in range(others)]
    for _ in range(40):
        for name in names:
            engine.backlog(name, numbers)
        engine.step()
    engine.ask("single", 1, 1)
    # What runs has to end, and each of the others may be given a place before it is behind.
    longest = (places + others) * (STEP_TOKENS + 13)
    for _ in range(longest):
        for name in names:
            engine.backlog(name, numbers)
        if "single" in engine.step():
            return
    raise AssertionError("it was never served")


@pytest.mark.parametrize("others", [set(), {"loading"}], ids=["two flows", "an adapter is loaded"])
def test_a_flow_that_gets_all_that_it_asks_for_earns_no_credit(others):
    """Else it could have the engine for itself for as long as it had asked for little."""
    shares = joined("modest", "greedy", *others)
    for _ in range(100):
        shares.begin_step({"greedy"} | others)
        for flow in others:
            shares.hold(flow)
        shares.charge("greedy", 50)
        shares.charge("modest", 2)
    shares.begin_step({"greedy", "modest"} | others)  # now it wants more, too
    assert shares.served("modest") == shares.served("greedy") - 48
    assert all(shares.served(flow) == shares.served("modest") for flow in others)


def test_where_nobody_waits_nobody_owes_anything():
    shares = joined("modest", "greedy")
    for _ in range(100):
        shares.begin_step(set())
        shares.charge("greedy", 50)
        shares.charge("modest", 2)
    shares.begin_step(set())
    assert shares.served("modest") == shares.served("greedy")
    first, last = sorted(shares.ranks(), key=shares.ranks().__getitem__)
    assert (first, last) == ("modest", "greedy")


def test_those_that_request_no_more_owe_something_while_one_waits_for_a_slot():
    shares = joined("waiting", "modest", "greedy")
    for _ in range(10):
        shares.begin_step(set())
        shares.hold("waiting", waits_for_slot=True)
        shares.charge("greedy", 50)
        shares.charge("modest", 2)
    shares.begin_step(set())
    assert shares.served("modest") == 20


def test_what_one_has_had_stays_when_it_requests_no_more():
    shares = joined("satisfied", "wanting")
    begin_step(shares)
    shares.charge("satisfied", 100)
    shares.begin_step({"wanting"})
    assert shares.served("satisfied") == 100


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside another"])
def test_the_turn_of_one_that_waited_for_a_slot_earns_no_credit_for_those_that_were_idle(is_alone):
    shares = joined("waiting", "idle", "busy")
    shares.leave("idle")
    for _ in range(10):
        begin_step(shares)
        shares.hold("waiting", waits_for_slot=True)
        shares.charge("busy", 50)
    if is_alone:
        begin_step(shares)
        shares.leave("busy")
    shares.unhold("waiting")
    if not is_alone:
        begin_step(shares)
    shares.join("idle")
    assert shares.served("waiting") == 0
    assert shares.served("idle") >= 450


def test_one_that_waits_for_a_slot_keeps_its_credit_though_no_queue_has_it():
    shares = joined("waiting", "greedy")
    for _ in range(10):
        shares.begin_step(set())
        shares.hold("waiting", waits_for_slot=True)
        shares.charge("greedy", 50)
    shares.begin_step(set())
    assert shares.served("waiting") == 0


def test_a_flow_is_heavy_until_another_has_had_nearly_as_much():
    shares = joined("large", "small")

    def step(large: float, small: float) -> bool:
        begin_step(shares)
        shares.charge("large", large)
        shares.charge("small", small)
        return shares.is_heavy("large")

    for _ in range(2 * HALF_LIFE_STEPS):
        step(HEAVY_RATIO + 1, 1)
    assert all(step(1.5, 1) for _ in range(10 * HALF_LIFE_STEPS))
    for _ in range(10 * HALF_LIFE_STEPS):
        is_heavy = step(1.1, 1)
    assert not is_heavy
    assert not any(step(HEAVY_RATIO - 1, 1) for _ in range(10 * HALF_LIFE_STEPS))


def test_a_flow_that_leaves_and_comes_back_has_had_what_it_had():
    shares = joined("greedy", "other")
    begin_step(shares)
    shares.charge("greedy", 500)
    shares.leave("greedy")
    shares.join("greedy")
    assert shares.served("greedy") == 500
    assert shares.served("other") == 0


@pytest.mark.parametrize("tokens", [1, 100], ids=["little", "much"])
def test_whoever_was_alone_owes_nothing_and_may_be_heavy(tokens):
    shares = joined("alone")
    for _ in range(20):
        assert not shares.is_contended
        shares.step_alone(tokens)
    shares.join("late")
    assert shares.is_contended
    assert shares.served("alone") == shares.served("late")
    begin_step(shares)
    shares.charge("late", 20)
    begin_step(shares)
    assert shares.is_heavy("alone") == (tokens == 100)
    assert not shares.is_heavy("late")


def test_shares_of_late_survive_any_number_of_steps(monkeypatch):
    monkeypatch.setattr(fair_shares, "_GROWTH", 2.0)  # a step is a half-life
    shares = joined("large", "small")
    for _ in range(2000):  # of 1024 the powers of two are more than a float can be
        begin_step(shares)
        shares.charge("large", 10)
        shares.charge("small", 1)
    begin_step(shares)
    assert shares.is_heavy("large")
    assert not shares.is_heavy("small")
    for _ in range(10):
        begin_step(shares)
        shares.charge("small", 10)
        shares.charge("large", 1)
    assert shares.is_heavy("small")
    assert not shares.is_heavy("large")


@pytest.mark.parametrize(("waits_for_slot", "served"), [(False, 90), (True, 0)])
def test_one_whose_requests_cannot_run_makes_nobody_heavy(waits_for_slot, served):
    """And earns no credit, unless it is for a slot that it waits."""
    shares = joined("held", "large", "other")
    for _ in range(10):
        begin_step(shares)
        shares.hold("held", waits_for_slot=waits_for_slot)
        shares.charge("large", 10)
        shares.charge("other", 9)
    begin_step(shares)
    assert not shares.is_heavy("large")
    assert (shares.served("held"), shares.served("other")) == (served, 90)


def test_a_flow_is_there_until_its_last_request_has_ended():
    shares = joined("one", "one", "two")
    shares.leave("one")
    assert shares.is_contended
    shares.leave("one")
    assert not shares.is_contended
    shares.charge("one", 1)  # what was under way for it is no matter


def test_whoever_comes_or_comes_back_has_had_as_much_as_one_that_is_alone():
    shares = joined("alone", "back")
    begin_step(shares)
    shares.charge("alone", 500)
    shares.leave("back")
    for flow in ("new", "back"):
        shares.join(flow)
        assert shares.served(flow) == 500
    assert shares.served("nobody") == 500


def held_beside_one_that_has_had_much() -> FairShares:
    shares = joined("held", "large")
    begin_step(shares)
    shares.charge("large", 100)
    shares.hold("held")
    return shares


@pytest.mark.parametrize("by", ["another request", "its adapter", "time", "a charge"])
def test_a_flow_whose_requests_could_not_run_counts_again(by):
    shares = held_beside_one_that_has_had_much()
    if by == "a charge":
        shares.charge("held", 1)
    else:
        for _ in range(HELD_STEPS):
            begin_step(shares)
            assert not shares.is_heavy("large")
    if by == "another request":
        shares.hold("held")
        shares.join("held")
    elif by == "its adapter":
        shares.hold("held")
        shares.unhold("held")
    begin_step(shares)
    assert shares.is_heavy("large")


def test_nobody_is_heavy_where_no_request_can_run():
    shares = held_beside_one_that_has_had_much()
    begin_step(shares)
    shares.hold("large")
    begin_step(shares)
    assert not shares.heavy_weight


def test_the_weight_of_all_that_are_heavy_is_known():
    shares = FairShares()
    for flow, weight in (("one", 1.0), ("two", 2.0), ("small", 4.0)):
        shares.join(flow, weight)
    begin_step(shares)
    for flow, cost in (("one", 100), ("two", 200), ("small", 1)):
        shares.charge(flow, cost)
    for _ in range(2):
        begin_step(shares)
        assert shares.heavy_weight == 3.0
    shares.hold("one")
    begin_step(shares)
    assert not shares.is_heavy("one")
    assert shares.heavy_weight == 2.0
    for flow in ("one", "small"):
        shares.leave(flow)
    shares.step_alone(1)
    assert not shares.is_heavy("two")
    assert not shares.heavy_weight


def test_what_one_has_had_alone_goes_by_its_weight():
    shares = FairShares()
    shares.join("alone", 4.0)
    shares.step_alone(8)
    shares.join("late")
    shares.charge("late", 1)
    begin_step(shares)
    assert not shares.is_heavy("alone")


def test_the_latest_weight_counts():
    shares = FairShares()
    shares.join("flow", 1.0)
    shares.join("flow", 4.0)
    shares.charge("flow", 8)
    assert shares.served("flow") == 2
    assert shares.worth("flow", 8) == 2


@pytest.mark.parametrize("weight", [0, -1.0, float("nan")], ids=str)
def test_a_weight_is_above_zero(weight):
    with pytest.raises(ValueError, match="must be above 0"):
        FairShares().join("flow", weight)


@pytest.mark.parametrize(
    ("prompt", "begin", "end", "cost"),
    [(10, 0, 10, 10), (10, 4, 10, 6), (10, 8, 14, 2 + 8), (10, 10, 11, 2), (10, 5, 5, 0)],
    ids=["prompt", "part", "both", "generated", "nothing"],
)
def test_a_generated_token_costs_twice_a_prompts(prompt, begin, end, cost):
    assert cost_of(prompt, begin, end) == cost


def test_reading_an_adapter_costs_as_much_as_reading_contexts_of_its_size():
    token = 23_040
    assert reading_cost(CONTEXT_TOKENS * token, token) == GENERATED_COST
    assert reading_cost(84 << 20, token) == pytest.approx(8 * reading_cost(10.5 * 2**20, token))
    assert reading_cost(84 << 20, 0) == 0, "a model without attention"


def test_of_very_many_flows_those_that_left_last_are_remembered():
    shares = FairShares()
    for flow in range(MAX_REMEMBERED + 1):
        shares.join(flow)
        shares.charge(flow, 10)
        shares.leave(flow)
    for flow, served in ((0, 0), (MAX_REMEMBERED, 10)):
        shares.join(flow)
        assert shares.served(flow) == served
        shares.leave(flow)


def test_of_very_many_flows_those_are_remembered_that_have_had_more_than_newcomers():
    shares = joined("greedy", "modest")
    begin_step(shares)
    shares.charge("greedy", 10)
    shares.leave("greedy")
    for flow in range(MAX_REMEMBERED):
        shares.join(flow)
        shares.leave(flow)
    shares.join("greedy")
    assert shares.served("greedy") == 10


def test_a_flow_that_was_alone_for_long_is_heavy_for_a_few_half_lives():
    shares = joined("alone")
    for _ in range(20 * HALF_LIFE_STEPS):
        shares.step_alone(10)
    shares.join("late")
    for _ in range(3 * HALF_LIFE_STEPS):
        begin_step(shares)
        for flow in ("alone", "late"):
            shares.charge(flow, 10)
    assert not shares.is_heavy("alone")


def test_what_a_flow_had_long_ago_makes_it_not_heavy_when_it_comes_back():
    """However long: the unit of what was had of late has been changed since."""
    shares = joined("stays")
    for _ in range(300 * HALF_LIFE_STEPS):
        shares.step_alone(1)
    shares.join("gone")
    shares.charge("gone", 10)
    shares.leave("gone")
    for _ in range(100 * HALF_LIFE_STEPS):
        shares.step_alone(1)
    shares.join("gone")
    for _ in range(10):
        begin_step(shares)
        assert not shares.is_heavy("gone")
        assert shares.is_heavy("stays")
        for flow in ("gone", "stays"):
            shares.charge(flow, 1)
