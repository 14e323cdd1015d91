"""What a benchmark is, and which there are.

A benchmark is a function in a file of a folder of `benchmarks/`, and is named like the file. Its
parameters are its options, with their defaults:

    @benchmark(
        workload="16 requests of ...",
        control="the base model, in the same rounds",
        figure="the plugin's time over the base model's",
        compares_to="1.10, the goal",
        quick={"rounds": 1},
    )
    def throughput(rounds: int = 5) -> Iterable[Figure]: ...
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Option = bool | int | float | str

_TRUTH = {"true": True, "false": False}
_OTHERS = ("harness", "loads")
"""Folders of `benchmarks/` without benchmarks."""


@dataclass(frozen=True)
class Figure:
    """What was measured of one case.

    Attributes:
        case: What it was measured of; a row of the benchmark's table. May be empty.
        measure: What was measured, with its unit; a column of the table.
        values: One for each round; at least one.
    """

    case: str
    measure: str
    values: Sequence[float]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's declaration.

    Attributes:
        measure: Takes the options and returns the figures.
        workload: What is done.
        control: What it is compared with within one run.
        figure: What counts.
        compares_to: Whose figure, or which goal, it stands beside.
        quick: Options that make it short, to see that it works; its figures do not count.
        plot: The measure that the report draws, if any.
    """

    measure: Callable[..., Iterable[Figure]]
    workload: str
    control: str
    figure: str
    compares_to: str
    quick: Mapping[str, Option]
    plot: str | None

    @property
    def name(self) -> str:
        return self.measure.__name__

    @property
    def about(self) -> str:
        """The first line of its documentation."""
        return (inspect.getdoc(self.measure) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, Option]:
        """Its options and their defaults."""
        parameters = inspect.signature(self.measure).parameters
        return {name: parameter.default for name, parameter in parameters.items()}

    def parse(self, texts: Iterable[str]) -> dict[str, Option]:
        """Options from texts like `rounds=3`.

        Raises:
            ValueError: There is no such option, or its value is of another type.
        """
        found: dict[str, Option] = {}
        for text in texts:
            name, _, value = text.partition("=")
            if name not in self.options:
                raise ValueError(
                    f"{self.name} has no option {name!r}; it has {', '.join(self.options)}"
                )
            kind = type(self.options[name])
            try:
                found[name] = _TRUTH[value.lower()] if kind is bool else kind(value)
            except (ValueError, KeyError):
                raise ValueError(f"{name} must be {kind.__name__}, got {value!r}") from None
        return found


_KNOWN: dict[str, Benchmark] = {}


def benchmark(
    *,
    workload: str,
    control: str,
    figure: str,
    compares_to: str,
    quick: Mapping[str, Option],
    plot: str | None = None,
) -> Callable[[Callable[..., Iterable[Figure]]], Callable[..., Iterable[Figure]]]:
    """Declares a function to be the benchmark of its file; see `Benchmark`."""

    def declare(measure: Callable[..., Iterable[Figure]]) -> Callable[..., Iterable[Figure]]:
        made = Benchmark(measure, workload, control, figure, compares_to, quick, plot)
        if measure.__module__.rpartition(".")[2] != made.name:
            raise ValueError(f"{measure.__module__}: {made.name} is not named like its file")
        _KNOWN[made.name] = made
        return measure

    return declare


def named(name: str) -> Benchmark:
    """The benchmark of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in names():
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(names())}")
    importlib.import_module(_modules()[name])
    return _KNOWN[name]


def names() -> list[str]:
    """Names of all benchmarks."""
    return sorted(_modules())


def _modules() -> dict[str, str]:
    """The module of each benchmark, by its name."""
    import benchmarks

    (root,) = benchmarks.__path__
    folders = [each.name for each in pkgutil.iter_modules([root]) if each.ispkg]
    return {
        module.name: f"benchmarks.{folder}.{module.name}"
        for folder in folders
        if folder not in _OTHERS
        for module in pkgutil.iter_modules([f"{root}/{folder}"])
    }
