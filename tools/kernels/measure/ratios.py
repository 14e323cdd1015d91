"""How many times faster, and how surely: from times that were measured in pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

# Of normally distributed values: standard deviation over median absolute deviation, and standard
# error of the median over that of the mean.
_DEVIATION_PER_MAD = 1.4826
_MEDIAN_ERROR = 1.2533


@dataclass(frozen=True)
class Ratio:
    """A ratio of times as a logarithm, with its uncertainty.

    Attributes:
        log: Natural logarithm of the ratio.
        error: Standard error of `log`.
    """

    log: float
    error: float

    @property
    def value(self) -> float:
        return math.exp(self.log)

    def at_least(self, errors: float) -> float:
        """The ratio less so many standard errors."""
        return math.exp(self.log - errors * self.error)


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The median over repetitions of `numerator[j] / denominator[j]`.

    The error comes from the median absolute deviation: one repetition that was interrupted
    moves neither.

    Raises:
        ValueError: The sequences are empty or of unequal length, or a time is not positive.
    """
    if not numerator or len(numerator) != len(denominator):
        raise ValueError(
            f"paired times must be equally many and not none, got {len(numerator)} and "
            f"{len(denominator)}"
        )
    if min(*numerator, *denominator) <= 0:
        raise ValueError("times must be positive, got one that is not")
    logs = [math.log(a / b) for a, b in zip(numerator, denominator, strict=True)]
    middle = median(logs)
    deviation = _DEVIATION_PER_MAD * median(abs(log - middle) for log in logs)
    return Ratio(middle, _MEDIAN_ERROR * deviation / math.sqrt(len(logs)))


def mean_ratio(ratios: Sequence[Ratio]) -> Ratio:
    """The geometric mean of ratios that were measured independently."""
    count = len(ratios)
    error = math.sqrt(sum(ratio.error**2 for ratio in ratios)) / count
    return Ratio(sum(ratio.log for ratio in ratios) / count, error)


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
