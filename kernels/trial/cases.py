"""Checks and times kernels case by case, and reports each case as it begins and ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from multilora_kernels.plan import PlanLayout
from multilora_kernels.trial.clocks import Clock
from multilora_kernels.trial.kinds import LayerKind
from multilora_kernels.trial.result_checks import problem_with, tolerance
from multilora_kernels.trial.trial_backends import Call, Prepare
from multilora_kernels.trial.trial_problems import TrialBatch, TrialProblem, Weights

MAX_ELEMENTS = 1 << 26
"""Outputs of a case: beyond it, float32 copies of them would take gigabytes of the device."""
MAX_TIMING_SECONDS = 20.0
"""Time that a trial's timing may take. The case that is timed when it ends is timed to its end."""
MAX_PROBLEM_CHARACTERS = 300
"""An error of a compiler may be thousands of lines; a log line shows its beginning."""


@dataclass(frozen=True)
class Backend:
    """Kernels that are tried.

    Attributes:
        prepare: Makes the call of a kind of layer.
        reads_rests: Whether it reads weights past an adapter's rank, which are zeros for it then.
            For others they are NaN, so that reading them shows.
    """

    prepare: Prepare
    reads_rests: bool = False


@dataclass(frozen=True)
class Begun:
    """A case begins; whatever happens until it has ended is its doing."""

    kind: int
    backend: str
    rows: int


@dataclass(frozen=True)
class Ended:
    """A case has ended.

    Attributes:
        kind: Place of its kind.
        backend: The kernels' name.
        rows: Rows of its batch.
        problem: What was wrong; empty if nothing was.
        seconds: Of one call, summed over the batches that are timed; None where nothing is timed.
        timing_s: Seconds that timing it took.
    """

    kind: int
    backend: str
    rows: int
    problem: str = ""
    seconds: float | None = None
    timing_s: float = 0.0


class LimitedClock:
    """A clock for a limited time.

    Args:
        clock: Times a call.
        seconds: Time that all timing may take.
        now: The time in seconds, for how long timing takes.
    """

    def __init__(
        self,
        clock: Clock,
        seconds: float = MAX_TIMING_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._left, self._now = clock, seconds, now

    def time(self, calls: Iterable[Callable[[], None]]) -> tuple[float | None, float]:
        """Seconds of all calls, None where no time is left, and seconds that timing them took."""
        if self._left <= 0:
            return None, 0.0
        begin = self._now()
        seconds = sum(map(self._clock, calls))
        taken = self._now() - begin
        self._left -= taken
        return seconds, taken


def run_cases(
    kinds: Sequence[LayerKind],
    rows: Sequence[int],
    backends: Mapping[str, Backend],
    report: Callable[[Begun | Ended], None],
    *,
    device: torch.device,
    max_tokens: int,
    clock: LimitedClock | None,
    skip: Collection[tuple[int, str, int]] = (),
) -> None:
    """Tries all backends with all kinds and row counts.

    A backend that fails in a case has no further ones of that kind. A kind with very wide outputs,
    such as an output layer, is tried with fewer rows (`MAX_ELEMENTS`).

    Args:
        kinds: Kinds of layers.
        rows: Row counts, ascending.
        backends: By name.
        report: Gets each case as it begins and as it ends.
        device: Where the kernels run.
        max_tokens: The largest number of rows of the server's steps.
        clock: Times calls while it has time; None: cases are only checked.
        skip: Cases that are over already, as kind, backend and rows.

    Raises:
        torch.OutOfMemoryError: The device has no room for a case.
    """
    for place, kind in enumerate(kinds):
        outputs = kind.columns or kind.slices * kind.a_rank
        fitting = [count for count in rows if count == rows[0] or count * outputs <= MAX_ELEMENTS]
        cases = {
            name: [count for count in fitting if (place, name, count) not in skip]
            for name in backends
        }
        if any(cases.values()):
            problem = TrialProblem(kind, device, max_tokens)
            _run_kind(place, problem, cases, backends, report, clock)
            del problem  # its memory is the next one's


def _run_kind(
    place: int,
    problem: TrialProblem,
    cases: Mapping[str, Sequence[int]],
    backends: Mapping[str, Backend],
    report: Callable[[Begun | Ended], None],
    clock: LimitedClock | None,
) -> None:
    for name, rows in cases.items():
        problem.fill_rests(0.0 if backends[name].reads_rests else math.nan)
        prepared = _Once(backends[name].prepare)
        for count in rows:
            report(Begun(place, name, count))
            ended = _try(prepared, problem, place, name, count, clock)
            report(ended)
            if ended.problem:
                break


class _Once:
    """Makes a kind's call when it is first needed, within the first case."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self._call: Call | None = None

    def __call__(self, kind: LayerKind, weights: Weights, layout: PlanLayout) -> Call:
        if self._call is None:
            self._call = self._prepare(kind, weights, layout)
        return self._call


def _try(
    prepare: _Once,
    problem: TrialProblem,
    place: int,
    name: str,
    rows: int,
    clock: LimitedClock | None,
) -> Ended:
    try:
        call = prepare(problem.kind, problem.weights, problem.layout)
        if found := check(call, problem, problem.mixed_batch(rows)):
            return Ended(place, name, rows, found)
        seconds, taken = None, 0.0
        if clock is not None:
            batches = problem.timed_batches(rows)
            seconds, taken = clock.time(_timed(call, batch) for batch in batches)
    except torch.OutOfMemoryError:  # which says nothing of the kernels
        raise
    except Exception as error:  # whatever kernels and their compilers may raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Ended(place, name, rows, text[:MAX_PROBLEM_CHARACTERS])
    return Ended(place, name, rows, seconds=seconds, timing_s=taken)


def check(call: Call, problem: TrialProblem, batch: TrialBatch) -> str:
    """What is wrong with a call's result; empty if it is right.

    The call is made twice: the second time, whatever it keeps from batch to batch is there.
    """
    expected = problem.expected(batch)
    allowed = tolerance(*problem.kind.dtypes)
    for _ in range(2):
        out = batch.out.clone()
        call(out, batch.given, batch.plan)
        if found := problem_with(out, expected, allowed):
            return found
    return ""


def _timed(call: Call, batch: TrialBatch) -> Callable[[], None]:
    # Sums grow while y is added to again and again: a product of zeros takes as long.
    out, given = batch.out.clone(), torch.zeros_like(batch.given)
    return lambda: call(out, given, batch.plan)
