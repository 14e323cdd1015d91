"""Launches through the real Triton of a process without a GPU, but for compiler or driver.

What Triton does on the host for a launch, binding and specialising arguments and looking kernels
up, runs as on a card. Where it would call the driver's launcher, the launch is noted. Not for
processes with TRITON_INTERPRET=1. Written against Triton 3.6 to 3.9.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import triton.compiler
from triton.compiler.compiler import CompiledKernel

from multilora_kernels import triton as backend
from multilora_kernels import triton_availability
from multilora_kernels.triton.compiling.compile_ahead import counted_compilations
from multilora_kernels.triton.compiling.compile_process import driver_of, target_of
from multilora_kernels.triton.launch import DeviceFacts


@dataclass
class Launches:
    """What has happened.

    Attributes:
        compiled: The kernels that would have been compiled, by name, in order.
        launched: For each launch the kernel, the grid and all of the arguments; nothing is added
            while `noting` is False.
        noting: Whether to note launches.
    """

    compiled: list[str] = field(default_factory=list)
    launched: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = field(default_factory=list)
    noting: bool = True


class _StandIn(CompiledKernel):  # type: ignore[misc]
    """A compiled kernel without code; Triton's own methods launch it."""

    def __init__(self, source: Any, launches: Launches) -> None:
        self.src, self.name, self.hash = source, source.name, source.name
        self.module = self.function = 0
        self.packed_metadata = self.metadata = ()
        self.n_regs = self.n_spills = 0

        def run(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            if launches.noting:
                launches.launched.append((self, (x, y, z), rest[4:]))

        self._run = run

    def __del__(self) -> None:
        pass


@contextmanager
def launched_without_card(
    processors: int = 132, architecture: int = 90, *, compiling: bool = False
) -> Iterator[Launches]:
    """Meanwhile kernels on CPU tensors are launched as on a card, and nothing runs.

    Args:
        processors: Of the card.
        architecture: Of the card.
        compiling: Whether kernels are compiled; `compiled` then names those only that Triton's
            cache on disk did not have.
    """
    launches = Launches()
    original = triton.compiler.compile

    def compile_nothing(source: Any, *_: Any, **__: Any) -> _StandIn:
        launches.compiled.append(source.name)
        return _StandIn(source, launches)

    def compile_really(source: Any, **how: Any) -> _StandIn:
        with counted_compilations() as found:
            original(source, **how)
        launches.compiled.extend(found)
        return _StandIn(source, launches)

    facts = DeviceFacts(f"sm_{architecture}", processors, pdl=architecture >= 90)
    with (
        patch.object(triton.compiler, "compile", compile_really if compiling else compile_nothing),
        patch.object(backend, "device_facts", lambda device: facts),
        patch.object(triton_availability, "require", lambda device: None),
        driver_of(target_of(facts.architecture)),
    ):
        yield launches
