"""Which kernels serve which row counts of a kind of layer, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from multilora_kernels.trial.cases import Ended

MARGIN = 0.02
"""By how much others must be faster to be taken: less is within what times vary by."""


class NoRightKernelError(RuntimeError):
    """No kernels compute a kind of layer rightly; the message names the kind and the problems."""


@dataclass(frozen=True)
class Choice:
    """The kernels of one kind of layer.

    Attributes:
        ranges: Ascending: the largest number of rows, None in the last one, and the kernels' name.
        problems: By kernels' name, what was wrong with them.
        microseconds: By kernels' name and rows, a call's time; of those that were timed.
    """

    ranges: tuple[tuple[int | None, str], ...]
    problems: dict[str, str] = field(default_factory=dict)
    microseconds: dict[str, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def always(cls, backend: str) -> Choice:
        """The same kernels for all rows."""
        return cls(((None, backend),))

    @property
    def backends(self) -> frozenset[str]:
        """Names of the kernels that serve some range."""
        return frozenset(name for _, name in self.ranges)

    def backend(self, rows: int) -> str:
        """The name of the kernels for so many rows."""
        return next(name for most, name in self.ranges if most is None or rows <= most)

    def describe(self) -> str:
        """The ranges in a few words, such as `ours up to 32 rows, vllm above`."""
        if len(self.ranges) == 1:
            return self.ranges[0][1]
        *bounded, (_, last) = self.ranges
        texts = [f"{name} up to {most} rows" for most, name in bounded]
        return ", ".join([*texts, f"{last} above"])


def choose(kind: int, description: str, ended: Iterable[Ended], ours: str, stock: str) -> Choice:
    """Chooses for one kind.

    Ours serve where they are right, unless the others are right as well and faster. A number of
    rows that was tried decides for those between it and the next lower one.

    Args:
        kind: Its place among the trial's.
        description: Its name, for errors.
        ended: The trial's cases.
        ours: Name of the kernels that serve where nothing speaks against them.
        stock: Name of the others.

    Raises:
        NoRightKernelError: Neither are right.
    """
    cases = [each for each in ended if each.kind == kind]
    problems = {
        each.backend: f"{each.problem} (with {each.rows} rows)" for each in cases if each.problem
    }
    tried = {each.backend for each in cases}
    for name in (ours, stock):
        if name not in tried:
            problems[name] = "not tried"
    microseconds: dict[str, dict[int, float]] = {}
    for each in cases:
        if each.seconds is not None:
            microseconds.setdefault(each.backend, {})[each.rows] = each.seconds * 1e6
    if ours in problems and stock in problems:
        raise NoRightKernelError(
            f"no kernels compute layers of the kind {description} rightly here: "
            + "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        )
    if ours in problems or stock in problems:
        right = stock if ours in problems else ours
        return Choice(((None, right),), problems, microseconds)
    ours_us, stock_us = microseconds.get(ours, {}), microseconds.get(stock, {})
    faster = []
    for count in sorted({each.rows for each in cases}):
        is_timed = count in ours_us and count in stock_us
        stock_is_faster = is_timed and stock_us[count] < ours_us[count] * (1 - MARGIN)
        faster.append((count, stock if stock_is_faster else ours))
    return Choice(_merged(faster), problems, microseconds)


def _merged(faster: Sequence[tuple[int, str]]) -> tuple[tuple[int | None, str], ...]:
    ranges: list[tuple[int | None, str]] = []
    for count, name in faster:
        if ranges and ranges[-1][1] == name:
            ranges.pop()
        ranges.append((count, name))
    return (*ranges[:-1], (None, ranges[-1][1]))
