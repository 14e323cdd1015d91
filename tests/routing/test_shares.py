"""Shares: as the weights say, a customer always with the same adapter, as few moves as can be."""

from collections import Counter

import pytest

from vllm_multilora.routing.request_facts import RequestFacts
from vllm_multilora.routing.route_targets import Turns, sticky_choice, turn_choice
from vllm_multilora.routing.routes_file import parse_routes

REQUESTS = 10_000
USERS = tuple(f"user-{number}" for number in range(REQUESTS))


def route(split, sticky="user"):
    weights = ", ".join(f"{name}: {weight}" for name, weight in split.items())
    text = f"routes: {{r: {{split: {{{weights}}}, sticky: '{sticky}'}}}}"
    target, turns = parse_routes("routes.yaml", text).targets["r"], Turns()
    return lambda **facts: target.candidates(RequestFacts(**facts), turns)[0]


SPLITS = [
    pytest.param({"stable": 90, "candidate": 10}, id="90-10"),
    pytest.param({"stable": 0.5, "candidate": 0.5}, id="halves"),
    pytest.param({"a": 5, "b": 3, "c": 2}, id="three"),
    pytest.param({"a": 1, "idle": 0, "b": 1}, id="one-idle"),
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("named", [True, False], ids=["users", "nobody"])
def test_requests_are_divided_by_weight(split, named):
    choose = route(split)
    counts = Counter(choose(user=user if named else None) for user in USERS)
    total = sum(split.values())
    for name, weight in split.items():
        assert counts[name] / REQUESTS == pytest.approx(weight / total, abs=0.01)
    assert all(counts[name] == 0 for name, weight in split.items() if weight == 0)


def test_a_customer_keeps_the_adapter_through_any_number_of_requests():
    choose, again = (route({"stable": 90, "candidate": 10}) for _ in range(2))
    first = {user: choose(user=user) for user in USERS}
    assert all(choose(user=user) == again(user=user) == first[user] for user in reversed(USERS))


def test_a_larger_share_takes_over_only_the_customers_that_it_must():
    before = route({"stable": 90, "candidate": 10})
    after = route({"stable": 80, "candidate": 20})
    moves = Counter((before(user=user), after(user=user)) for user in USERS)
    assert moves["stable", "candidate"] / REQUESTS == pytest.approx(0.10, abs=0.01)
    assert moves["candidate", "stable"] == 0


def test_a_new_adapter_takes_customers_and_moves_nobody_else():
    before, after = route({"a": 1, "b": 1}), route({"a": 1, "b": 1, "c": 1})
    moves = Counter((before(user=user), after(user=user)) for user in USERS)
    assert moves["a", "b"] == moves["b", "a"] == 0
    assert (moves["a", "c"] + moves["b", "c"]) / REQUESTS == pytest.approx(1 / 3, abs=0.015)


def test_splits_at_different_places_divide_customers_independently():
    weights = {"x": 1, "y": 1}
    agree = sum(
        sticky_choice(user, weights, "one") == sticky_choice(user, weights, "two") for user in USERS
    )
    assert agree / REQUESTS == pytest.approx(0.5, abs=0.02)


def test_shares_without_customers_hold_over_short_runs_too():
    weights = {"stable": 90.0, "candidate": 10.0}
    for start in range(0, 1_000, 7):
        run = [turn_choice(turn, weights) for turn in range(start, start + 100)]
        assert 8 <= run.count("candidate") <= 12


def test_customers_may_be_distinguished_by_a_header_or_by_metadata():
    weights = {"a": 1, "b": 1}
    by_user, by_header, by_metadata = (
        route(weights, sticky) for sticky in ("user", "header:X-Customer", "metadata:customer")
    )
    for user in USERS[:100]:
        chosen = by_user(user=user)
        assert by_header(user="other", headers={"x-customer": user}) == chosen
        assert by_metadata(user="other", metadata={"customer": user}) == chosen


def test_the_choice_is_the_same_in_every_process_and_version():
    weights = {"stable": 90.0, "candidate": 10.0}
    users = [user for user in USERS[:60] if sticky_choice(user, weights, "r") == "candidate"]
    assert users == ["user-35", "user-38", "user-39", "user-51"]
