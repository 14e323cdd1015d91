"""Who computes a batch: these kernels, and whatever other packages enter for comparison.

Another package enters by an entry point of the group `multilora_kernels.contenders` that names a
class with a class method `contenders()`. So this package compares itself with vLLM's kernels
without knowing vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from multilora_kernels.api import PreparedLinear
from multilora_kernels.measure.batches import LayerBatch

ENTRY_POINT_GROUP = "multilora_kernels.contenders"


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
        linear = PreparedLinear(
            batch.lora_a, batch.lora_b, batch.ranks, batch.plan.layout, backend=self._backend
        )
        return lambda: linear(batch.y, batch.x, batch.plan)


@dataclass(frozen=True)
class Entered:
    """The contenders that other packages entered.

    Attributes:
        contenders: Those that can be had.
        left_out: (name of the entry point, reason) of those that cannot.
    """

    contenders: tuple[Contender, ...]
    left_out: tuple[tuple[str, str], ...]


def load_contenders(entries: Iterable[EntryPoint] | None = None) -> Entered:
    """Asks every entry point of the group for its contenders.

    Args:
        entries: The entry points; None: those of the installed packages.
    """
    if entries is None:
        entries = entry_points(group=ENTRY_POINT_GROUP)
    contenders: list[Contender] = []
    left_out: list[tuple[str, str]] = []
    for entry in entries:
        try:
            contenders += entry.load().contenders()
        except (ImportError, AttributeError, ContenderUnavailableError) as error:
            left_out.append((entry.name, f"{type(error).__name__}: {error}"))
    return Entered(tuple(contenders), tuple(left_out))
