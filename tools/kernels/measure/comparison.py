"""One case of the benchmark: everybody checked, then everybody timed in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from tools.kernels.measure.agreement import TOLERANCES, Expected
from tools.kernels.measure.baselines import BaseLayer
from tools.kernels.measure.batches import LayerBatch
from tools.kernels.measure.contenders import Contender, ContenderUnavailableError
from tools.kernels.measure.limits import Peaks, adapter_work, share_of_peak
from tools.kernels.measure.ratios import geometric_mean, paired_ratio
from tools.kernels.measure.timing import Call, Timer


@dataclass(frozen=True)
class CaseResult:
    """What one case gave. Times are medians in microseconds.

    Attributes:
        case: Its name.
        group: The group whose mean it is part of.
        active_adapters: Adapters in the batch.
        base_us: Time of the layer's own product.
        microseconds: Time by contender.
        share_of_peak: Time needed at the device's peaks over the time taken, by contender.
            Empty if the peaks were not measured.
        ratios: The first contender's time over that of each other one and of the base layer:
            below 1 the first one is faster. Empty if the first one was not timed.
        errors: Relative RMS error by contender, of all that could be run.
        not_timed: Reason by contender.
    """

    case: str
    group: str
    active_adapters: int
    base_us: float
    microseconds: dict[str, float] = field(default_factory=dict)
    share_of_peak: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    not_timed: dict[str, str] = field(default_factory=dict)


def available(
    contenders: Iterable[Contender], batch: LayerBatch
) -> tuple[list[Contender], dict[str, str]]:
    """Contenders that can compute on the batch's device, and the others' reasons by name."""
    able: list[Contender] = []
    left_out: dict[str, str] = {}
    for contender in contenders:
        try:
            contender.prepare(batch)
        except ContenderUnavailableError as error:
            left_out[contender.name] = str(error)
        else:
            able.append(contender)
    return able, left_out


def compare(
    case: str,
    group: str,
    batch: LayerBatch,
    contenders: Sequence[Contender],
    timer: Timer,
    peaks: Peaks | None,
    repetitions: int,
) -> CaseResult:
    """Checks and times the contenders on one batch.

    Args:
        case: Name of the case.
        group: Its group.
        batch: The batch; its y is overwritten.
        contenders: The first one is what the others are compared with.
        timer: How to measure.
        peaks: The device's, where shares of them mean something.
        repetitions: Of the timing.
    """
    expected, tolerance = Expected(batch), TOLERANCES[batch.y.dtype]
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    not_timed: dict[str, str] = {}
    for contender in contenders:
        name = contender.name
        try:
            call = contender.prepare(batch)
            errors[name] = expected.relative_error(call)
        # Whatever somebody else's code raises is a result, and no reason to lose the others'.
        except Exception as error:
            not_timed[name] = f"failed: {type(error).__name__}: {error}"
            continue
        if errors[name] <= tolerance:
            calls[name] = call
        else:
            not_timed[name] = (
                f"wrong: relative RMS error {errors[name]:.2g}, tolerance {tolerance:.0e}"
            )
    base, *times = timer.paired([BaseLayer().prepare(batch), *calls.values()], repetitions)
    by_name = dict(zip(calls, times, strict=True))
    medians = {name: median(own) for name, own in by_name.items()}
    shares: dict[str, float] = {}
    if peaks is not None:
        work = adapter_work(batch)
        shares = {name: share_of_peak(work, peaks, time) for name, time in medians.items()}
    first = by_name.get(contenders[0].name)
    others = {name: own for name, own in by_name.items() if own is not first}
    return CaseResult(
        case=case,
        group=group,
        active_adapters=batch.plan.runs,
        base_us=median(base),
        microseconds=medians,
        share_of_peak=shares,
        ratios={}
        if first is None
        else {
            name: paired_ratio(first, own).value
            for name, own in (others | {BaseLayer.name: base}).items()
        },
        errors=errors,
        not_timed=not_timed,
    )


def group_means(results: Iterable[CaseResult]) -> dict[str, dict[str, tuple[float, int]]]:
    """Geometric mean of the ratios and how many cases it is over, by group and contender."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for name, ratio in result.ratios.items():
            ratios.setdefault(result.group, {}).setdefault(name, []).append(ratio)
    return {
        group: {name: (geometric_mean(own), len(own)) for name, own in by_name.items()}
        for group, by_name in ratios.items()
    }
