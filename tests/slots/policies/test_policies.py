"""Each policy as a table: what was used, who is offered, who goes."""

import pytest

from vllm_multilora.slots.policies.policy_registry import make_policy


def victim(name, uses, candidates, *, sizes=None, costs=None, offered_before=()):
    """The choice after single-adapter uses (of ids 1 to 9) and, before them, earlier victims."""
    policy = make_policy(name)
    for adapter_id in range(1, 10):
        policy.added(
            adapter_id, (sizes or {}).get(adapter_id, 1), (costs or {}).get(adapter_id, 1.0)
        )
    for use in uses:
        adapter_ids = (use,) if isinstance(use, int) else use
        policy.used(adapter_ids, adapter_ids)
    for earlier in offered_before:
        policy.removed(policy.victim(earlier))
    return policy.victim(candidates)


def give_up(policy, adapter_id):
    assert policy.victim((adapter_id,)) == adapter_id
    policy.removed(adapter_id)


@pytest.mark.parametrize(
    ("uses", "candidates", "expected"),
    [
        pytest.param([1, 2, 3], [1, 2, 3], 1, id="oldest use goes"),
        pytest.param([1, 2, 3, 1], [1, 2, 3], 2, id="a use makes recent"),
        pytest.param([1, 1, 1, 2], [1, 2], 1, id="frequency does not count"),
        pytest.param([1, 2, 3], [2, 3], 2, id="only candidates go"),
        pytest.param([3, 2, 1], [1, 2, 3, 4], 4, id="unused goes first"),
        pytest.param([(2, 5), 1], [1, 2, 5], 2, id="one step is one instant, ties to lowest id"),
        pytest.param([], [4, 7], 4, id="nothing known, lowest id"),
    ],
)
def test_lru(uses, candidates, expected):
    assert victim("lru", uses, candidates) == expected


@pytest.mark.parametrize(
    ("uses", "candidates", "expected"),
    [
        pytest.param([1, 1, 2, 3, 3], [1, 2, 3], 2, id="least frequent goes"),
        pytest.param([1, 1, 2], [1, 2], 2, id="recency does not count"),
        pytest.param([1, 2], [1, 2], 1, id="ties to lowest id"),
        pytest.param([(1, 2), (1, 3)], [1, 2, 3], 2, id="a step counts for each of its adapters"),
    ],
)
def test_lfu(uses, candidates, expected):
    assert victim("lfu", uses, candidates) == expected


def test_lfu_ages_what_was_popular_once():
    policy = make_policy("lfu")
    policy.added(1, 1, 1.0)
    for _ in range(5):
        policy.used((1,), (1,))
    # Each newcomer is used twice and given up for the next one: the age rises to 2, then 4.
    survivors = []
    for newcomer in (2, 3, 4, 5):
        policy.added(newcomer, 1, 1.0)
        policy.used((newcomer,), (newcomer,))
        policy.used((newcomer,), ())
        gone = policy.victim((1, newcomer))
        survivors.append(gone != 1)
        if gone == 1:
            break
        policy.removed(gone)
    assert survivors == [True, True, False]


@pytest.mark.parametrize("name", ["lfu", "gdsf"])
def test_a_use_lifts_what_was_used_long_ago_to_the_age_of_today(name):
    policy = make_policy(name)
    policy.added(1, 1, 1.0)
    for newcomer in (2, 3):
        policy.added(newcomer, 1, 1.0)
        for _ in range(2):
            policy.used((newcomer,), (newcomer,))
        give_up(policy, newcomer)
    policy.used((1,), (1,))
    policy.added(4, 1, 1.0)
    assert policy.victim((1, 4)) == 4


@pytest.mark.parametrize(
    ("uses", "candidates", "expected"),
    [
        pytest.param([1, 2, 3], [1, 2, 3], 1, id="on probation, oldest use goes"),
        pytest.param([1, 1, 2, 3], [1, 2, 3], 2, id="used twice is protected"),
        pytest.param([1, 1, 2, 2, 3], [1, 2], 1, id="all protected, oldest use goes"),
        pytest.param([2, 2, 1], [1, 2], 1, id="probation goes before older protected"),
        pytest.param([4, 2], [2, 4, 5], 5, id="unused goes first"),
    ],
)
def test_slru(uses, candidates, expected):
    assert victim("slru", uses, candidates) == expected


def slru_of(adapters, protected):
    """An SLRU of that many adapters, the first of them used twice."""
    policy = make_policy("slru")
    for adapter_id in range(1, adapters + 1):
        policy.added(adapter_id, 1, 1.0)
    for adapter_id in (*range(1, protected + 1), *range(1, protected + 1)):
        policy.used((adapter_id,), (adapter_id,))
    return policy


def test_slru_sends_the_oldest_protected_back_when_their_share_is_full():
    policy = slru_of(10, protected=9)
    give_up(policy, 10)  # room for 8 in the share: 1 goes back to the recent end of probation
    policy.added(11, 1, 1.0)
    policy.used((11,), (11,))
    assert policy.victim((1, 11)) == 1
    assert policy.victim((3, 11)) == 11  # still protected


def test_slru_forgets_the_share_of_adapters_that_left():
    policy = slru_of(20, protected=8)
    for adapter_id in range(1, 9):
        for _ in range(3):
            policy.removed(adapter_id)
            policy.added(adapter_id, 1, 1.0)
            policy.used((adapter_id,), (adapter_id,))
            policy.used((adapter_id,), (adapter_id,))
    give_up(policy, 20)
    policy.used((19,), (19,))
    assert policy.victim((1, 19)) == 19


def test_slru_has_a_share_of_what_is_left():
    policy = slru_of(10, protected=10)
    for adapter_id in range(6, 11):
        policy.removed(adapter_id)
    give_up(policy, 5)  # room for 4 of 5 in the share: 1 goes back to the recent end of probation
    policy.added(11, 1, 1.0)
    policy.used((11,), (11,))
    assert policy.victim((1, 11)) == 1


def test_slru_counts_the_share_in_size():
    """Adapter 1 is half of all bytes: with 2 to 5 protected too, it is too much."""
    twice = [use for adapter_id in range(1, 6) for use in (adapter_id, adapter_id)]
    sizes = {1: 8}  # of 16
    assert victim("slru", twice, range(2, 6), sizes=sizes) == 2
    assert victim("slru", [*twice, 6, 6], range(1, 7), sizes=sizes) == 1


@pytest.mark.parametrize(
    ("uses", "sizes", "costs", "expected"),
    [
        pytest.param([1, 2], {1: 10, 2: 1}, {}, 1, id="large goes before small"),
        pytest.param([1] * 20 + [2], {1: 10, 2: 1}, {}, 2, id="used enough, large stays"),
        pytest.param([1, 2], {1: 2, 2: 2}, {1: 9.0, 2: 1.0}, 2, id="cheap to reload goes"),
        pytest.param([1, 2], {1: 2, 2: 1}, {1: 2.0, 2: 1.0}, 1, id="cost by size, ties to lowest"),
    ],
)
def test_gdsf(uses, sizes, costs, expected):
    assert victim("gdsf", uses, [1, 2], sizes=sizes, costs=costs) == expected


@pytest.mark.parametrize("name", ["lru", "lfu", "slru", "gdsf"])
def test_an_adapter_that_returns_starts_anew(name):
    policy = make_policy(name)
    for adapter_id in (1, 2, 3, 4, 5):
        policy.added(adapter_id, 1, 1.0)
    for adapter_id in (1, 1, 1, 2, 2):
        policy.used((adapter_id,), (adapter_id,))
    policy.removed(1)
    policy.added(1, 1, 1.0)
    policy.used((2,), (2,))
    assert policy.victim((1, 2)) == 1
