"""How long a step takes, by what is in its batch: a sum of terms that are 0 or more.

A step has a fixed part (the model's weights are read once, Python runs through its layers), a part
for each token of a prompt and each request that gets a token, and attention's: one for each pair of
tokens of a prompt, and one for each token of a context that is read for one more. Where adapters
take part, their kernels have a fixed part, their matrices are read once each, and they multiply
each of their tokens: in proportion to the adapter's bytes, which are in proportion to its rank.
Prompts beside requests that generate cost more than each alone, as kernels are made for one or the
other. Loads beside a step take processor time from it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul

import numpy as np

from vllm_multilora.slots.budget import MIB

TERMS = (
    "step",
    "prompt_token",
    "generated_token",
    "prompt_pair",
    "context_token",
    "adapters_at_all",
    "adapter_mib",
    "adapted_token",
    "adapted_token_mib",
    "mixed",
    "mixed_row",
    "load_beside",
)
"""What a step's time is a sum of, in the order of `Batch.amounts`."""

_REQUEST = "request"


@dataclass(frozen=True)
class Batch:
    """What a step computes.

    Attributes:
        prompt_tokens: Tokens of prompts.
        rows: Requests that get a token.
        prompt_pairs: For each of the prompts' tokens, those that attention looks at; summed.
        context_tokens: Tokens of the contexts of requests that generate, the new ones included.
        adapter_bytes: Of the adapters in the batch, each counted once.
        adapted_tokens: Computed tokens of requests with adapters.
        adapted_token_bytes: The bytes of its adapter for each of them, summed.
        is_loading: Whether adapters are read meanwhile.
    """

    prompt_tokens: int = 0
    rows: int = 0
    prompt_pairs: float = 0
    context_tokens: int = 0
    adapter_bytes: int = 0
    adapted_tokens: int = 0
    adapted_token_bytes: float = 0
    is_loading: bool = False

    @property
    def amounts(self) -> tuple[float, ...]:
        """How much of each of `TERMS` there is."""
        is_mixed = self.prompt_tokens > 0 and self.context_tokens > 0
        return (
            1.0,
            self.prompt_tokens,
            self.rows,
            self.prompt_pairs,
            self.context_tokens,
            self.adapter_bytes > 0,
            self.adapter_bytes / MIB,
            self.adapted_tokens,
            self.adapted_token_bytes / MIB,
            is_mixed,
            self.rows if is_mixed else 0,
            self.is_loading,
        )


def pairs_of(tokens: int, before: int = 0) -> float:
    """Pairs that attention looks at for so many tokens of a prompt, with so many before them."""
    return tokens * before + tokens * (tokens + 1) / 2


@dataclass(frozen=True)
class Sample:
    """A step that was timed.

    Attributes:
        case: What was measured; steps of one case differ by nothing but the length of contexts.
        batch: What was computed.
        seconds: How long it took, above 0.
        has_request: Whether a request's way to the engine and its answer's way back are in it.
    """

    case: str
    batch: Batch
    seconds: float
    has_request: bool = False


class StepCost:
    """Seconds that steps take.

    Args:
        seconds: For one of each of `TERMS`.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = tuple(seconds[term] for term in TERMS)

    def of(self, batch: Batch) -> float:
        """Seconds that a step with this batch takes."""
        return sum(map(mul, self._seconds, batch.amounts), 0.0)


@dataclass(frozen=True)
class Fit:
    """The terms' costs that explain samples best.

    Attributes:
        seconds: For one of each of `TERMS`; 0 where nothing was measured of it.
        request_s: Seconds of a request outside the engine.
        residual: Root mean square, over all cases, of how far the fitted time of a case's steps is
            from their measured mean, relative to it.
        worst: The largest of these.
        worst_case: Where it is.
    """

    seconds: dict[str, float]
    request_s: float
    residual: float
    worst: float
    worst_case: str


def fit(samples: Sequence[Sample]) -> Fit:
    """Fits the model by least squares of relative errors, with no cost below 0.

    A sample weighs as much as its case's median is short, so that a case's own outliers, which
    belong to its mean, are not taken for less than others.

    Raises:
        ValueError: There are no samples.
    """
    if not samples:
        raise ValueError("no step was timed")
    cases: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        cases[sample.case].append(place)
    seconds = np.array([sample.seconds for sample in samples])
    amounts = np.array([(*s.batch.amounts, s.has_request) for s in samples], dtype=float)
    weights = np.empty(len(samples))
    for places in cases.values():
        weights[places] = 1 / statistics.median(seconds[places])
    found = _nonnegative(amounts * weights[:, None], seconds * weights)
    fitted = amounts @ found
    errors = {
        case: float(fitted[places].mean() / seconds[places].mean() - 1)
        for case, places in cases.items()
    }
    worst = max(errors, key=lambda case: abs(errors[case]))
    named = dict(zip((*TERMS, _REQUEST), map(float, found), strict=True))
    return Fit(
        seconds={term: named[term] for term in TERMS},
        request_s=named[_REQUEST],
        residual=float(np.sqrt(np.mean(np.square(list(errors.values()))))),
        worst=errors[worst],
        worst_case=worst,
    )


def _nonnegative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares of shape [columns]; a column that would get less than 0 is left out."""
    norms = np.linalg.norm(matrix, axis=0)
    kept = [column for column in range(matrix.shape[1]) if norms[column] > 0]
    found = np.zeros(matrix.shape[1])
    while kept:
        scaled, *_ = np.linalg.lstsq(matrix[:, kept] / norms[kept], target, rcond=None)
        if scaled.min() >= 0:
            found[kept] = scaled / norms[kept]
            break
        del kept[int(scaled.argmin())]
    return found


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The fixed part and the slope, both 0 or more, of the straight line through points (x, y)."""
    matrix = np.array([(1.0, x) for x, _ in points])
    fixed, slope = _nonnegative(matrix, np.array([y for _, y in points]))
    return float(fixed), float(slope)
