"""Choosing a configuration so that it holds on batches that it was not chosen on.

The best of a hundred configurations on a few batches is partly the luckiest one, and partly the
one that those batches suit. So the choice is made on training batches alone, by the geometric
mean of paired ratios, and then has to beat the default on held-out batches: other seeds, token
counts, popularities and ranks. It is kept only if it wins there by more than noise explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tools.kernels.measure.ratios import Ratio, mean_ratio, paired_ratio
from tools.kernels.measure.timing import Call, Timer

Config = TypeVar("Config")
_Config = TypeVar("_Config", contravariant=True)

_GROUP = 8  # candidates that are timed beside one default


class UnusableConfigError(RuntimeError):
    """A configuration does not fit the card, spills registers or computes something wrong."""


class Trial(Protocol[_Config]):
    """A batch that configurations are tried on."""

    def call(self, config: _Config | None) -> Call:
        """The computation with a configuration; None: with the computed default.

        Raises:
            UnusableConfigError: It must not be used.
        """


@dataclass(frozen=True)
class Effort:
    """How often calls are timed.

    Attributes:
        screening: Repetitions for every candidate, on every training batch.
        finalists: Candidates that are looked at more closely.
        final: Repetitions for each of them, on every training batch.
        validation: Repetitions for the winner, on every held-out batch.
    """

    screening: int = 10
    finalists: int = 5
    final: int = 50
    validation: int = 200

    def timed_calls(self, candidates: int, training: int, held_out: int) -> int:
        """Timed calls that one choice takes at most, the default's among them."""

        def group(configs: int) -> int:
            return configs + -(-configs // _GROUP)

        screening = training * self.screening * group(candidates)
        final = training * self.final * group(min(self.finalists, candidates))
        return screening + final + held_out * self.validation * group(min(1, candidates))


@dataclass(frozen=True)
class Margins:
    """What a configuration has to show on held-out batches.

    Attributes:
        gain: The mean must be faster than the default by more than this share ...
        errors: ... even less so many standard errors.
        loss: No single batch may be slower by more than this share.
    """

    gain: float = 0.03
    errors: float = 3.0
    loss: float = 0.05


@dataclass(frozen=True)
class Choice(Generic[Config]):
    """What became of a search.

    Attributes:
        config: The configuration to use; None: the computed default.
        gain: How many times faster than the default `config` was on held-out batches; 1 for the
            default itself.
        reason: Why, in words, with the figures.
        unusable: Candidates that could not be used.
    """

    config: Config | None
    gain: float
    reason: str
    unusable: int


def choose(
    candidates: Sequence[Config],
    training: Sequence[Trial[Config]],
    held_out: Sequence[Trial[Config]],
    timer: Timer,
    effort: Effort,
    margins: Margins,
) -> Choice[Config]:
    """The best candidate of the training batches, if it also wins on the held-out ones.

    Args:
        candidates: Without the default.
        training: The choice is made on these.
        held_out: And checked on these, with nothing to choose any more.
        timer: How to measure.
        effort: How often.
        margins: What to ask for.

    Raises:
        UnusableConfigError: The default itself is.
    """
    for trial in (*training, *held_out):
        trial.call(None)
    usable = [config for config in candidates if _is_usable(config, training)]
    unusable = len(candidates) - len(usable)
    screened = _gains(usable, training, timer, effort.screening)
    order = sorted(range(len(usable)), key=lambda i: -screened[i].log)
    finalists = [usable[i] for i in order[: effort.finalists]]
    final = _gains(finalists, training, timer, effort.final)
    best = max(range(len(finalists)), key=lambda i: final[i].log, default=None)
    if best is None or final[best].log <= 0:
        return Choice(None, 1.0, "nothing was faster than the default in training", unusable)
    winner = finalists[best]
    if not _is_usable(winner, held_out):
        reason = f"the best of training cannot be used on every held-out batch: {winner}"
        return Choice(None, 1.0, reason, unusable + 1)
    gains = [_gains([winner], [trial], timer, effort.validation)[0] for trial in held_out]
    mean, worst = mean_ratio(gains), min(gain.value for gain in gains)
    figures = (
        f"{mean.value:.3f} times the default's speed on held-out batches "
        f"({mean.at_least(margins.errors):.3f} less {margins.errors:g} standard errors, "
        f"worst batch {worst:.3f})"
    )
    if mean.at_least(margins.errors) <= 1 + margins.gain:
        return Choice(None, 1.0, f"not faster beyond noise: {figures}", unusable)
    if worst < 1 - margins.loss:
        return Choice(None, 1.0, f"too slow on one batch: {figures}", unusable)
    return Choice(winner, mean.value, figures, unusable)


def _is_usable(config: Config, trials: Sequence[Trial[Config]]) -> bool:
    try:
        for trial in trials:
            trial.call(config)
    except UnusableConfigError:
        return False
    return True


def _gains(
    configs: Sequence[Config], trials: Sequence[Trial[Config]], timer: Timer, repetitions: int
) -> list[Ratio]:
    """Time of the default over that of each configuration: geometric means over the trials."""
    gains: list[Ratio] = []
    for first in range(0, len(configs), _GROUP):
        group = configs[first : first + _GROUP]
        ratios: list[list[Ratio]] = [[] for _ in group]
        for trial in trials:
            calls = [trial.call(None), *(trial.call(config) for config in group)]
            default, *others = timer.paired(calls, repetitions)
            for own, times in zip(ratios, others, strict=True):
                own.append(paired_ratio(default, times))
        gains += map(mean_ratio, ratios)
    return gains
