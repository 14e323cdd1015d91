"""Compiling kernels in several processes, ahead of launches that would compile them one by one."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Thread
from types import TracebackType
from typing import Any

import torch

from multilora_kernels.triton.compiling.compile_process import CompileJob, Target, TensorFacts
from multilora_kernels.triton.launch import Launch

MAX_SECONDS = 300.0
"""For all jobs of a call. The slowest kernel takes some seconds; what remains is compiled later."""

PROGRAM = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from multilora_kernels.triton.compiling.compile_process import main
main()
"""
"""What a process runs; its arguments are modules to import first."""


def compile_jobs(launches: Iterable[Launch], target: Target) -> list[CompileJob]:
    """What has to be compiled for launches, each kernel once, in order.

    Args:
        launches: Over tensors of any device, or of none.
        target: The card.
    """
    return list(dict.fromkeys(_job(launch, target) for launch in launches))


def _job(launch: Launch, target: Target) -> CompileJob:
    kernel = launch.kernel
    how = {
        p.name: (not p.do_not_specialize, not p.do_not_specialize_on_alignment)
        for p in kernel.params
    }
    arguments = [(name, _alike(value, *how[name])) for name, value in launch.arguments.items()]
    return CompileJob(
        kernel.fn.__module__,
        kernel.fn.__name__,
        target,
        tuple(arguments),
        tuple(launch.constants.items()),
        tuple(launch.options.items()),
    )


def _alike(value: Any, special: bool, by_alignment: bool) -> Any:
    """One value for all values of a parameter that Triton compiles the same kernel for."""
    if isinstance(value, tuple):
        return tuple(_alike(each, special, by_alignment) for each in value)
    if isinstance(value, torch.Tensor):
        facts = TensorFacts.of(value)
        return facts if special and by_alignment else replace(facts, aligned=True)
    if type(value) is not int:
        return value
    wide = 0 if -(1 << 31) <= value < 1 << 31 else 1 << 32
    if not special:
        return wide + 2
    if value == 1:
        return 1
    return wide + (16 if by_alignment and value % 16 == 0 else 2)


class CompilePool:
    """Processes that compile; to be used in a `with` statement.

    They share nothing with this process but Triton's cache on disk. So any process may have them,
    also one with a CUDA context, and one that multiprocessing started as a daemon.

    Args:
        processes: How many, at most as many as there is work for.
        modules: What a process imports first.
    """

    def __init__(self, processes: int, modules: Sequence[str] = ()) -> None:
        self._most, self._modules = processes, tuple(modules)
        self._processes: list[_Process] = []

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.end()

    def compile(self, jobs: Sequence[CompileJob]) -> list[str]:
        """Returns when all jobs are over, or after `MAX_SECONDS`.

        Args:
            jobs: What to compile; each may be in Triton's cache already.

        Returns:
            What went wrong, in words: a launch will compile those kernels itself, and meet the same
            error if it was the compiler's. Empty if all is well.
        """
        todo: queue.SimpleQueue[CompileJob] = queue.SimpleQueue()
        for job in jobs:
            todo.put(job)
        problems: list[str] = []
        try:
            while len(self._processes) < min(self._most, len(jobs)):
                self._processes.append(_Process(self._modules))
        except OSError as error:  # a lack of memory, say: those that there are do the work
            problems.append(f"a process could not be started: {error}")
        threads = [
            Thread(target=process.work, args=(todo, problems), daemon=True)
            for process in self._processes
        ]
        end = time.monotonic() + MAX_SECONDS
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            problems.append(f"not all of {len(jobs)} kernels were compiled in {MAX_SECONDS:.0f} s")
            with suppress(queue.Empty):
                while True:
                    todo.get_nowait()
            for process in self._processes:
                process.kill()
            for thread in threads:
                thread.join()
        for process in self._processes:
            if not process.is_alive:
                process.end()
        self._processes = [process for process in self._processes if process.is_alive]
        left = todo.qsize()
        if left and not self._processes:
            problems.append(f"{left} kernels were left when all processes had ended")
        return problems


class _Process:
    """A process and the pipes to it; `work` is for one thread at a time."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by `end`
        # Found there as they are found here, from wherever this process has them.
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def work(self, todo: queue.SimpleQueue[CompileJob], problems: list[str]) -> None:
        """Compiles jobs until there are none, or the process ends."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(queue.Empty):
            while True:
                job = todo.get_nowait()
                try:
                    pickle.dump(job, stdin)
                    stdin.flush()
                    problem = pickle.load(stdout)
                except (OSError, EOFError, pickle.UnpicklingError):
                    code = self._process.wait()
                    problems.append(f"{job.kernel}: its process ended with {code}{self._last()}")
                    return
                if problem is not None:
                    problems.append(f"{job.kernel}: {problem}")

    def _last(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        return f": {lines[-1]}" if lines else ""

    def kill(self) -> None:
        """Ends the process, whatever it does; `work` then returns."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Ends the process and closes its pipes, after `work`."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._errors.close()
