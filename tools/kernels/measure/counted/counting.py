"""Counts what a LoRA layer reads, writes and starts, by running it in Triton's interpreter.

Nothing here is a formula: each load and store of each program is observed, lane by lane, and
put down to the tensor in whose memory it falls. Times cannot be measured that way; the work can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import InterpreterError

from tools.kernels.measure.batches import LayerBatch
from tools.kernels.measure.counted.interpreter import observe

SECTOR_BYTES = 32
"""The smallest piece of memory that a GPU's caches fetch."""

WEIGHTS, ACTIVATIONS, INTERMEDIATE, METADATA = KINDS = (
    "weights",
    "activations",
    "intermediate",
    "metadata",
)
"""A and B; x and y; what one kernel leaves to the next; integers that describe the batch."""

# Operators of torch that start nothing on a device, beside those that only make a view. What is
# read to the host here are flags that lie there on a GPU too.
_ALLOCATING = {"empty", "empty_strided", "empty_like", "new_empty"}
_READING = {"item", "_local_scalar_dense"}
_CLEARING = {"zero_", "zeros", "zeros_like", "new_zeros", "fill_", "full", "full_like"}


class CountingError(RuntimeError):
    """A kernel touched memory that belongs to none of the tensors it was given."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one kind of tensor.

    Attributes:
        loaded: By all programs together; what two programs, or two instructions of one, load
            counts twice.
        stored: Likewise.
        touched: Loaded or stored, each byte once: what no cache can save.
        sectors: The same in whole sectors of `SECTOR_BYTES`, as memory delivers them.
    """

    loaded: int = 0
    stored: int = 0
    touched: int = 0
    sectors: int = 0


@dataclass(frozen=True)
class LaunchWork:
    """One launch of a Triton kernel.

    Attributes:
        kernel: Name of the function.
        programs: The size of its grid.
        with_weights: Programs that loaded weights.
        exited: Programs that neither loaded weights nor stored anything.
    """

    kernel: str
    programs: int
    with_weights: int
    exited: int


@dataclass(frozen=True)
class Work:
    """What one call of a layer did.

    Attributes:
        launches: Its Triton kernels, in order.
        operators: Kernels of torch's own, in order, by operator.
        cleared: Bytes that torch's kernels filled with a constant, such as a buffer's zeros.
        traffic: Of the Triton kernels, by kind.
    """

    launches: tuple[LaunchWork, ...]
    operators: tuple[str, ...]
    cleared: int
    traffic: dict[str, Traffic]

    @property
    def kernels(self) -> int:
        """Kernel launches, torch's own included."""
        return len(self.launches) + len(self.operators)

    @property
    def programs(self) -> int:
        """Programs of all Triton launches."""
        return sum(launch.programs for launch in self.launches)

    @property
    def with_weights(self) -> int:
        """Number of programs that loaded weights."""
        return sum(launch.with_weights for launch in self.launches)

    @property
    def exited(self) -> int:
        """Number of programs that neither loaded weights nor stored anything."""
        return sum(launch.exited for launch in self.launches)


def count_work(call: Callable[[], None], batch: LayerBatch) -> Work:
    """Runs the call and counts.

    Args:
        call: What a contender prepared for the batch.
        batch: Tensors in CPU memory.

    Raises:
        CountingError: A kernel reached into memory it was not given.
        ValueError: The batch is on a device that Triton's interpreter does not run on.
    """
    if batch.x.device.type != "cpu":
        raise ValueError(f"work is counted on CPU tensors, the batch is on {batch.x.device}")
    known = {WEIGHTS: (*batch.lora_a, *batch.lora_b), ACTIVATIONS: (batch.x, batch.y)}
    counter = _Counter(known)
    operators = _Operators(counter)
    try:
        with observe(counter), operators:
            call()
    except InterpreterError:
        if counter.failure is not None:  # the interpreter wraps what is raised inside a kernel
            raise counter.failure from None
        raise
    return Work(
        launches=tuple(
            LaunchWork(launch.kernel, len(launch.programs), *launch.summary())
            for launch in counter.launches
        ),
        operators=tuple(operators.names),
        cleared=operators.cleared,
        traffic={kind: counter.traffic(kind) for kind in KINDS},
    )


@dataclass
class _Region:
    """The memory of one tensor and what happened to it."""

    kind: str
    start: int
    stop: int
    item_size: int
    loaded: int = 0
    stored: int = 0
    touched: npt.NDArray[np.bool_] = field(init=False)  # per element, aligned to sectors

    def __post_init__(self) -> None:
        self.first_sector = self.start // SECTOR_BYTES * SECTOR_BYTES
        sectors = -(-(self.stop - self.first_sector) // SECTOR_BYTES)
        self.touched = np.zeros(sectors * SECTOR_BYTES // self.item_size, dtype=np.bool_)

    def access(self, addresses: npt.NDArray[np.uint64], item_size: int, store: bool) -> None:
        if item_size != self.item_size:
            raise CountingError(
                f"{item_size}-byte elements of a {self.kind} tensor of {self.item_size}-byte ones"
            )
        self.touched[(addresses - np.uint64(self.first_sector)) // np.uint64(item_size)] = True
        if store:
            self.stored += len(addresses) * item_size
        else:
            self.loaded += len(addresses) * item_size

    def touched_sectors(self) -> int:
        return int(self.touched.reshape(-1, SECTOR_BYTES // self.item_size).any(axis=1).sum())


@dataclass
class _Launch:
    kernel: str
    programs: list[tuple[bool, bool]] = field(default_factory=list)  # loaded weights, stored

    def summary(self) -> tuple[int, int]:
        with_weights = sum(weights for weights, _ in self.programs)
        return with_weights, sum(not (weights or stored) for weights, stored in self.programs)


class _Counter:
    """Keeps the books of one call; see `interpreter.Observer`."""

    def __init__(self, known: dict[str, tuple[torch.Tensor, ...]]) -> None:
        self.launches: list[_Launch] = []
        self.is_launching = False
        self.failure: CountingError | None = None
        self._kept: list[torch.Tensor] = []
        self._regions: dict[int, _Region] = {}
        for kind, tensors in known.items():
            for tensor in tensors:
                self._add(kind, tensor)

    def _add(self, kind: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in self._regions and storage.nbytes():
            stop = start + storage.nbytes()
            self._regions[start] = _Region(kind, start, stop, tensor.element_size())
            self._kept.append(tensor)  # so that nothing else gets this memory meanwhile

    def begin_launch(self, kernel: Callable[..., Any], tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self._add(INTERMEDIATE if tensor.is_floating_point() else METADATA, tensor)
        self._starts = np.array(sorted(self._regions), dtype=np.uint64)
        self.launches.append(_Launch(kernel.__name__))
        self.is_launching = True

    def end_launch(self) -> None:
        self.is_launching = False

    def begin_program(self) -> None:
        self.launches[-1].programs.append((False, False))

    def access(self, addresses: npt.NDArray[np.uint64], item_size: int, store: bool) -> None:
        if not len(addresses):
            return
        try:
            region = self._region_of(int(addresses.min()), int(addresses.max()) + item_size)
            region.access(addresses, item_size, store)
        except CountingError as error:
            self.failure = error
            raise
        programs = self.launches[-1].programs
        weights, stored = programs[-1]
        programs[-1] = weights or region.kind == WEIGHTS, stored or store

    def _region_of(self, start: int, stop: int) -> _Region:
        place = int(np.searchsorted(self._starts, np.uint64(start), side="right")) - 1
        if place >= 0:
            region = self._regions[int(self._starts[place])]
            if stop <= region.stop:
                return region
        raise CountingError(
            f"{self.launches[-1].kernel} reaches for bytes {start:#x} to {stop:#x}, which do not "
            f"lie in any one of its tensors"
        )

    def traffic(self, kind: str) -> Traffic:
        regions = [region for region in self._regions.values() if region.kind == kind]
        return Traffic(
            loaded=sum(region.loaded for region in regions),
            stored=sum(region.stored for region in regions),
            touched=sum(int(region.touched.sum()) * region.item_size for region in regions),
            sectors=sum(region.touched_sectors() for region in regions) * SECTOR_BYTES,
        )


class _Operators(TorchDispatchMode):
    """Notes torch's own kernels, but not what the interpreter itself does with tensors."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.cleared = 0
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (self._counter.is_launching or func.is_view or name in _ALLOCATING | _READING):
            self.names.append(name)
            if name in _CLEARING:
                self.cleared += result.numel() * result.element_size()
        return result
