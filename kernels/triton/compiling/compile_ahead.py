"""Compiling all kernels of a server in several processes, before it calls any of them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

from multilora_kernels.triton import INTERPRETED
from multilora_kernels.triton.compiling.compile_pool import CompilePool, compile_jobs
from multilora_kernels.triton.compiling.compile_process import CompileJob
from multilora_kernels.triton.launch import noted_launches

logger = logging.getLogger(__name__)

MAX_PROCESSES = 16
"""Each takes some 0.4 GiB of host memory while it compiles."""

MAX_PROBLEMS = 3
"""Problems that a message names."""


@dataclass(frozen=True)
class CompiledCalls:
    """What it took to have all kernels.

    Attributes:
        kernels: That the calls launch.
        processes: That compiled them; 0 if all had been compiled before, or one alone could.
        problems: What went wrong there, in words.
        late: Names of the kernels that this process compiled in the calls.
    """

    kernels: int = 0
    processes: int = 0
    problems: tuple[str, ...] = ()
    late: tuple[str, ...] = ()


def call_compiled(
    calls: Callable[[], None], *, workers: int = 1, worker: int = 0, processes: int | None = None
) -> CompiledCalls:
    """Calls kernels once processes of their own have compiled all of them.

    To learn what that is, the calls are made once without launching anything. A process that fails
    is no error: what it leaves is compiled in the calls. In Triton's interpreter there are only the
    calls.

    Args:
        calls: Calls all kernels; is called twice.
        workers: Processes of this machine that do the same at the same time.
        worker: The number of this one of them. Each begins elsewhere, so that most kernels are
            compiled by one of them only.
        processes: How many; None: one for each of this worker's processors.
    """
    if INTERPRETED:
        calls()
        return CompiledCalls()
    with noted_launches() as launches:
        calls()
    target = driver.active.get_current_target()
    jobs = compile_jobs(launches, (target.backend, target.arch, target.warp_size))
    if processes is None:
        processes = len(os.sched_getaffinity(0)) // workers
    processes = min(processes, MAX_PROCESSES, len(jobs))
    problems: list[str] = []
    stamp = _stamp(jobs)
    if processes < 2 or stamp.exists():
        processes = 0
    else:
        first = len(jobs) * worker // workers
        with CompilePool(processes) as pool:
            problems = pool.compile([*jobs[first:], *jobs[:first]])
        if problems:
            logger.warning(
                "%d LoRA kernels could not all be compiled ahead, and are compiled one by one: %s",
                len(jobs),
                "; ".join(problems[:MAX_PROBLEMS]),
            )
    with counted_compilations() as late:
        calls()
    if not stamp.exists():
        with suppress(OSError):  # the next start then compiles ahead what is there already
            stamp.touch()
    return CompiledCalls(len(jobs), processes, tuple(problems), tuple(late))


def _stamp(jobs: Sequence[CompileJob]) -> Path:
    """An empty file in Triton's cache that says that all of these kernels are there.

    Its name follows from the kernels' sources, from what they are compiled for, and from Triton.
    """
    described = [f"triton {triton.__version__}", *sorted(map(repr, jobs))]
    described += sorted({job.function.cache_key for job in jobs})
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()
    return Path(knobs.cache.dir) / f"multilora-{digest[:32]}.compiled"


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Meanwhile the names of kernels that Triton compiles in this process are put on a list."""
    before: Any = knobs.compilation.listener
    found: list[str] = []

    def note(**facts: Any) -> None:
        if before is not None:
            before(**facts)
        if not facts["cache_hit"]:
            found.append(facts["src"].name)

    knobs.compilation.listener = note
    try:
        yield found
    finally:
        knobs.compilation.listener = before
