"""Fits the model of a step's time to measured steps."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_multilora.toolbox.capacity.calibration import Residual
from vllm_multilora.toolbox.capacity.step_cost import TERMS, StepBatch


@dataclass(frozen=True)
class Sample:
    """A step that was timed.

    Attributes:
        case: What was measured; steps of one case differ by nothing but the length of contexts.
        seconds: How long it took, above 0.
        has_request: Whether a request's way to the engine and its answer's way back are in it.
    """

    case: str
    batch: StepBatch
    seconds: float
    has_request: bool = False


@dataclass(frozen=True)
class Fit:
    """Seconds for one of each of `TERMS`, 0 where nothing was measured of it, and of a request."""

    seconds: dict[str, float]
    request_s: float
    residual: Residual


def fit(samples: Sequence[Sample]) -> Fit:
    """Fits the model by least squares of relative errors, with no cost below 0.

    Cases weigh alike, however often they were measured. A sample weighs as much as its case's
    median is short, so that a case's own outliers, which belong to its mean, are not taken for
    less than others.

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
        weights[places] = 1 / (statistics.median(seconds[places]) * math.sqrt(len(places)))
    found = _nonnegative(amounts * weights[:, None], seconds * weights)
    fitted = amounts @ found
    errors = {
        case: float(fitted[places].mean() / seconds[places].mean() - 1)
        for case, places in cases.items()
    }
    worst = max(errors, key=lambda case: abs(errors[case]))
    *costs, request_s = map(float, found)
    residual = Residual(
        rms=float(np.sqrt(np.mean(np.square(list(errors.values()))))),
        worst=errors[worst],
        worst_case=worst,
        steps=len(samples),
    )
    return Fit(dict(zip(TERMS, costs, strict=True)), request_s, residual)


def _nonnegative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares of shape [columns]; a column that would get less than 0 is left out."""
    norms = np.linalg.norm(matrix, axis=0)
    kept = [column for column in range(matrix.shape[1]) if norms[column] > 0]
    found = np.zeros(matrix.shape[1])
    while kept:
        scaled, *_ = np.linalg.lstsq(matrix[:, kept] / norms[kept], target, rcond=None)
        if scaled.min() >= 0:
            found[kept] = np.abs(scaled) / norms[kept]  # no -0
            break
        del kept[int(scaled.argmin())]
    return found


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The fixed part and the slope, both 0 or more, of the straight line through points (x, y)."""
    matrix = np.array([(1.0, x) for x, _ in points])
    fixed, slope = _nonnegative(matrix, np.array([y for _, y in points]))
    return float(fixed), float(slope)
