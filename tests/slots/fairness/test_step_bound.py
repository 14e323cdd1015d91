"""What is added to a step is as much as it takes to make it so many times as long."""

from random import Random

import pytest

from vllm_multilora.slots.fairness.step_bound import PROBE_STEPS, StepBound

LIMIT = 2048
HARDWARE = {
    "small CPU": lambda added: 0.0037 + 0.00005 * added,
    "GPU": lambda added: max(0.006, 0.0045 + 0.00004 * added),
    "free": lambda added: 0.006,
    "slow": lambda added: 0.1 + 0.01 * added,
}


def run(bound: StepBound, seconds, steps: int, *, requested=LIMIT, least=0.0) -> list[float]:
    """What was added to each of so many steps."""
    had = []
    for _ in range(steps):
        added = min(requested, bound.next(least))
        bound.took(seconds(added), added)
        had.append(added)
    return had


@pytest.mark.parametrize("slowdown", [1.2, 1.5, 3.0])
@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=HARDWARE)
def test_steps_are_as_long_as_they_may_be(hardware, slowdown):
    bound = StepBound(slowdown, LIMIT)
    run(bound, hardware, 600)
    had = [added for added in run(bound, hardware, 160) if added]
    longest = max(map(hardware, had)) / hardware(0)
    assert longest <= slowdown * 1.05
    assert longest >= slowdown * 0.9 or max(had) == LIMIT


@pytest.mark.parametrize("seed", range(3))
def test_where_times_vary_three_steps_of_four_are_short_enough(seed):
    numbers, bound, late = Random(seed), StepBound(1.5, LIMIT), []

    def seconds(added: float) -> float:
        taken = HARDWARE["small CPU"](added) * numbers.lognormvariate(0, 0.15)
        if added:
            late.append(taken > 1.5 * HARDWARE["small CPU"](0))
        return taken

    run(bound, seconds, 600)
    late.clear()
    run(bound, seconds, 1600)
    assert sum(late) / len(late) == pytest.approx(0.25, abs=0.1)


def test_it_follows_a_machine_that_has_slowed_down():
    bound = StepBound(1.5, LIMIT)
    before = run(bound, HARDWARE["small CPU"], 600)[-1]
    after = run(bound, lambda added: 0.0037 + 0.0002 * added, 600)[-1]
    assert after == pytest.approx(before / 4, rel=0.2)


def test_it_follows_others_that_ask_for_more():
    bound = StepBound(1.5, LIMIT)
    run(bound, HARDWARE["small CPU"], 600)
    had = run(bound, lambda added: 0.037 + 0.00005 * added, 1000)
    assert max(had[-PROBE_STEPS:]) == pytest.approx(0.5 * 0.037 / 0.00005, rel=0.1)


def test_one_step_of_so_many_has_nothing_added():
    had = run(StepBound(1.5, LIMIT), HARDWARE["GPU"], 10 * PROBE_STEPS)
    assert had[::PROBE_STEPS] == [0.0] * 10
    assert sum(added == 0 for added in had) == 10


def test_what_is_guaranteed_is_had_however_long_it_takes():
    bound = StepBound(1.5, LIMIT)
    had = run(bound, HARDWARE["slow"], 400, least=24.0)
    assert {added for number, added in enumerate(had[64:], 64) if number % PROBE_STEPS} == {24.0}
    had = run(bound, HARDWARE["GPU"], 600, least=24.0)
    assert had[-1] > 100


def test_what_was_guaranteed_beyond_what_they_may_have_says_nothing_of_that():
    bound = StepBound(1.5, LIMIT)
    bound.took(0.01, 0)
    before = bound.allowance
    bound.took(1.0, before + 1)
    assert bound.allowance == before
    bound.took(1.0, before)
    assert bound.allowance < before


def test_they_may_have_a_token_of_however_small_a_step_and_no_more_than_all_of_it():
    assert StepBound(1.5, 8).allowance == 1
    bound = StepBound(1.5, LIMIT)
    run(bound, HARDWARE["free"], 1000)
    assert bound.allowance == LIMIT
    run(bound, lambda added: 1.0 + added, 1000)
    assert bound.allowance == 1


def test_whoever_asks_for_little_earns_nothing_by_it():
    """Else a long prompt after many short steps would make a very long one."""
    bound = StepBound(1.5, LIMIT)
    before = bound.allowance
    run(bound, HARDWARE["GPU"], 400, requested=4)
    assert bound.allowance == before


def test_without_a_time_to_compare_with_nothing_changes():
    bound = StepBound(1.5, LIMIT)
    before = bound.allowance
    for _ in range(50):
        bound.took(1.0, before)
    assert bound.allowance == before
