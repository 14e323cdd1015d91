"""Compiles Triton kernels in a process of its own, which needs no GPU.

    python -c "from multilora_kernels.triton.compiling.compile_process import main; main()"

It reads jobs from standard input and answers each on standard output, both pickled, until the input
ends (`compile_pool` is the other side). What it compiles lies in Triton's cache on disk afterwards,
where a launch in any process finds it. Written against Triton 3.6 to 3.9.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

Target = tuple[str, int | str, int]
"""Backend, architecture and threads of a warp, as `GPUTarget` takes them."""

_LARGE = 1 << 31  # bytes of a tensor from which ROCm's compiler makes another kernel


def target_of(architecture: str) -> Target:
    """The target of an architecture such as sm_90 or gfx942."""
    if architecture.startswith("gfx"):
        return "hip", architecture, 64
    return "cuda", int(architecture.removeprefix("sm_")), 32


@dataclass(frozen=True)
class TensorFacts:
    """A tensor, as far as a kernel is compiled for it; takes its place in a job.

    Attributes:
        dtype: Of its elements.
        aligned: Whether it begins at a multiple of 16 bytes.
        small: Whether it has less than 2 GiB.
    """

    dtype: torch.dtype
    aligned: bool
    small: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorFacts:
        """The facts of a tensor."""
        small = tensor.untyped_storage().size() < _LARGE
        return cls(tensor.dtype, tensor.data_ptr() % 16 == 0, small)

    def data_ptr(self) -> int:
        return 0 if self.aligned else 2

    def ptr_range(self) -> int:
        return 0 if self.small else _LARGE


@dataclass(frozen=True)
class CompileJob:
    """A kernel and what it is compiled for.

    Attributes:
        module: Where the kernel is defined.
        kernel: Its name there.
        target: The card that it is compiled for.
        arguments: Parameters, with tensors as `TensorFacts`, by name.
        constants: Compile-time parameters by name.
        options: Warps, stages and the like by name.
    """

    module: str
    kernel: str
    target: Target
    arguments: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def function(self) -> Any:
        """The kernel itself."""
        return getattr(import_module(self.module), self.kernel)

    def run(self) -> None:
        """Compiles, unless Triton's cache on disk has it."""
        given = dict(self.arguments) | dict(self.constants) | dict(self.options)
        with driver_of(self.target):
            self.function.warmup(grid=(1,), **given)


class _Driver:
    """Answers for one card, as far as compiling asks."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(*target)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def driver_of(target: Target) -> Iterator[None]:
    """Meanwhile Triton compiles for a card that need not be there."""
    before = driver._active
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver.set_active(before)


def main() -> None:
    """Answers each job with None, or with what went wrong in words."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not get between the answers
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            job = pickle.load(sys.stdin.buffer)
            problem = None
            try:
                job.run()
            except Exception as error:  # the compiler's are of many kinds, and need not travel
                problem = f"{type(error).__name__}: {error}"
            pickle.dump(problem, answers)
            answers.flush()
