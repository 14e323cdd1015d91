"""Launches through the real Triton of a process without a GPU, but for compiler or driver.

What Triton does on the host for a launch, binding and specialising arguments and looking kernels
up, runs as on a card. `compile_without_card` also compiles. In `launched_without_card` a stand-in
is made instead, and where it would call the driver's launcher, the launch is noted. Not for
processes with TRITON_INTERPRET=1. Written against Triton 3.6 to 3.9.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from multilora_kernels import triton as backend
from multilora_kernels import triton_availability
from multilora_kernels.triton.launch import DeviceFacts, Launch


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


class _Driver:
    """Of one card of an architecture, such as sm_90 or gfx942."""

    def __init__(self, architecture: str) -> None:
        if architecture.startswith("gfx"):
            self._target = GPUTarget("hip", architecture, 64)
        else:
            self._target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def compile_without_card(launch: Launch, architecture: str) -> None:
    """Puts the kernel of a launch where a launch on such a card will find it: on disk.

    Args:
        launch: Over tensors without memory, if that is all there is.
        architecture: Such as sm_90 or gfx942.
    """
    with _driver_of(architecture):
        launch.kernel.warmup(
            grid=launch.grid, **launch.arguments, **launch.constants, **launch.options
        )


@contextmanager
def _driver_of(architecture: str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Driver(architecture))
    try:
        yield
    finally:
        driver.set_active(before)


@contextmanager
def launched_without_card(processors: int = 132, architecture: int = 90) -> Iterator[Launches]:
    """Meanwhile kernels on CPU tensors are launched as on a card, and nothing runs."""
    launches = Launches()

    def compile_nothing(source: Any, *_: Any, **__: Any) -> _StandIn:
        launches.compiled.append(source.name)
        return _StandIn(source, launches)

    facts = DeviceFacts(f"sm_{architecture}", processors, pdl=architecture >= 90)
    with (
        patch.object(triton.compiler, "compile", compile_nothing),
        patch.object(backend, "device_facts", lambda device: facts),
        patch.object(triton_availability, "require", lambda device: None),
        _driver_of(facts.architecture),
    ):
        yield launches
