"""Choosing a configuration from times: what is taken, and what is refused."""

from dataclasses import dataclass

import numpy as np
import pytest

from tools.kernels.measure.tuned.selection import Effort, Margins, UnusableConfigError, choose

EFFORT = Effort(screening=5, finalists=3, final=20, validation=50)
MARGINS = Margins(gain=0.03, errors=3.0, loss=0.05)


@dataclass(frozen=True)
class Simulated:
    """A call that takes so many microseconds, times noise."""

    microseconds: float

    def __call__(self):
        raise AssertionError("the simulated timer runs nothing")


@dataclass
class SimulatedTimer:
    """Answers with the calls' own times and log-normal noise, from a seed."""

    noise: float = 0.0
    seed: int = 0
    timed: int = 0

    method = "simulated"

    def __post_init__(self):
        self._random = np.random.default_rng(self.seed)

    def paired(self, calls, repetitions):
        self.timed += len(calls) * repetitions
        noise = np.exp(self._random.normal(0, self.noise, (len(calls), repetitions)))
        return [(call.microseconds * own).tolist() for call, own in zip(calls, noise, strict=True)]


@dataclass(frozen=True)
class SimulatedTrial:
    """A batch on which each configuration has a time; the default is None."""

    times: dict

    def call(self, config):
        if self.times[config] is None:
            raise UnusableConfigError(f"{config} spills")
        return Simulated(self.times[config])


def simulated(*times):
    return [SimulatedTrial({None: 100.0} | own) for own in times]


def search(candidates, training, held_out, **noise):
    timer = SimulatedTimer(**noise)
    return choose(candidates, training, held_out, timer, EFFORT, MARGINS)


def test_what_only_suits_the_training_batches_is_refused():
    training = simulated({"overfit": 50.0, "honest": 95.0}) * 3
    held_out = simulated({"overfit": 104.0, "honest": 95.0}) * 3
    found = search(["honest", "overfit"], training, held_out, noise=0.01)
    assert found.config is None
    assert found.gain == 1
    assert found.reason.startswith("not faster beyond noise: 0.96")


@pytest.mark.parametrize("seed", range(10))
def test_noise_alone_keeps_the_default(seed):
    """One of 40 equal candidates is luckiest in training; validation does not believe it."""
    equal = dict.fromkeys(range(40), 100.0)
    found = search(list(equal), simulated(equal) * 3, simulated(equal) * 3, noise=0.2, seed=seed)
    assert found.config is None


def test_a_gain_that_makes_one_kind_of_batch_slow_is_refused():
    training = simulated({"uneven": 60.0})
    held_out = simulated({"uneven": 60.0}, {"uneven": 60.0}, {"uneven": 110.0})
    found = search(["uneven"], training, held_out)
    assert found.config is None
    assert found.reason.startswith("too slow on one batch")
    assert "worst batch 0.909" in found.reason


def test_what_cannot_be_used_is_left_out_wherever_that_shows():
    training = simulated({"spills": None, "wide": 50.0, "good": 80.0})
    held_out = simulated({"spills": None, "wide": None, "good": 80.0})
    found = search(["spills", "good"], training, held_out)
    assert (found.config, found.unusable) == ("good", 1)
    found = search(["spills", "wide"], training, held_out)
    assert (found.config, found.unusable) == (None, 2)
    assert found.reason == "the best of training cannot be used on every held-out batch: wide"


@pytest.mark.parametrize("candidates", [0, 1, 8, 9, 20])
def test_a_search_times_as_many_calls_as_was_announced(candidates):
    times = {number: 90.0 - number for number in range(candidates)}
    timer = SimulatedTimer()
    choose(list(times), simulated(times) * 4, simulated(times) * 3, timer, EFFORT, MARGINS)
    assert timer.timed == EFFORT.timed_calls(candidates, training=4, held_out=3)
