"""Who computes a batch: these kernels, and others for comparison.

The others are classes with a class method `contenders()`, named as text and imported when they are
needed, since what they import may not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Protocol

from multilora_kernels import PreparedLinear, column_major
from tools.kernels.measure.batches import LayerBatch

OTHERS = ("tools.kernels.stock_kernels:StockKernels",)
"""Implementations that these kernels are compared with, as `module:class`."""


class ContenderUnavailableError(RuntimeError):
    """A contender cannot run here; the message says why."""


class Contender(Protocol):
    """An implementation of a LoRA layer."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def prepare(self, batch: LayerBatch) -> Callable[[], None]:
        """Does what is done once per step or once per layer.

        Returns:
            The call of one layer: adds the adapters' part to `batch.y`, in place. It may be
            repeated, and captured into a CUDA graph.

        Raises:
            ContenderUnavailableError: It cannot compute batches on this device.
        """


class Multilora:
    """These kernels.

    Args:
        backend: As for `multilora_kernels.lora_linear`.
    """

    def __init__(self, backend: str = "triton") -> None:
        self._backend = backend
        self.name = f"multilora ({backend})"

    def prepare(self, batch: LayerBatch) -> Callable[[], None]:
        """See `Contender`; the plan was built with the batch."""
        batch = by_column(batch)
        linear = PreparedLinear(
            batch.lora_a, batch.lora_b, batch.ranks, batch.plan.layout, backend=self._backend
        )
        return lambda: linear(batch.y, batch.x, batch.plan)


def by_column(batch: LayerBatch) -> LayerBatch:
    """The batch with B's columns contiguous, as these kernels' slots have them."""
    if all(b.stride(-2) == 1 for b in batch.lora_b):
        return batch
    return replace(batch, lora_b=tuple(column_major(b).copy_(b) for b in batch.lora_b))


@dataclass(frozen=True)
class Entered:
    """Implementations for a comparison with these kernels.

    Attributes:
        contenders: Implementations that can run here.
        left_out: The others, each as (what was to be imported, reason).
    """

    contenders: tuple[Contender, ...]
    left_out: tuple[tuple[str, str], ...]


def load_contenders(names: Sequence[str] = OTHERS) -> Entered:
    """Imports contenders.

    Args:
        names: As `OTHERS`.
    """
    contenders: list[Contender] = []
    left_out: list[tuple[str, str]] = []
    for name in names:
        try:
            contenders += resolve_name(name).contenders()
        except (ImportError, AttributeError, ContenderUnavailableError) as error:
            left_out.append((name, f"{type(error).__name__}: {error}"))
    return Entered(tuple(contenders), tuple(left_out))
