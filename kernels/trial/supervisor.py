"""Runs a trial in a child process, and ends what hangs."""

from __future__ import annotations

import logging
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from multilora_kernels.trial.cases import Begun, Ended
from multilora_kernels.trial.child import OUT_OF_MEMORY, READY
from multilora_kernels.trial.requests import TrialRequest, decode_event

logger = logging.getLogger(__name__)

MAX_RESTARTS = 8
"""Processes that may hang or fault before a trial is given up: one for most kinds of a model."""
_KILL_SECONDS = 10.0  # a process whose kernel hangs may need some for its end


class TrialError(RuntimeError):
    """A trial could not be run; the message says why."""


@dataclass(frozen=True)
class TrialLimits:
    """How long things may take, in seconds.

    Attributes:
        start: Until a process is ready: imports, and the device's context.
        case: One case: compilation of its kernels, which takes some seconds, and its calls.
        trial: All of it.
    """

    start: float = 180.0
    case: float = 60.0
    trial: float = 600.0


def run_trial(request: TrialRequest, limits: TrialLimits | None = None) -> list[Ended]:
    """Tries all of a request's cases, whatever happens in some.

    A case in which the process hangs or ends counts as failed, and the next process goes on with
    the other kernels of that kind.

    Args:
        request: The cases.
        limits: Time limits; None: the defaults.

    Returns:
        The cases that have ended, in order.

    Raises:
        TrialError: No process gets as far as the first case, or time is up.
    """
    limits = limits or TrialLimits()
    deadline = time.monotonic() + limits.trial
    ended: list[Ended] = []
    for _ in range(1 + MAX_RESTARTS):
        before = len(ended)
        failed = _run_once(request, limits, deadline, ended)
        if failed is None:
            return ended
        ended.append(failed)
        done = {(each.kind, each.backend, each.rows) for each in ended}
        bad = {(each.kind, each.backend) for each in ended if each.problem}
        done |= {(kind, name, rows) for kind, name in bad for rows in request.rows}
        timing_s = sum(each.timing_s for each in ended[before:])
        request = request.without(frozenset(done), timing_s)
    raise TrialError(f"kernels hung or faulted {1 + MAX_RESTARTS} times; the last: {failed}")


def _run_once(
    request: TrialRequest, limits: TrialLimits, deadline: float, ended: list[Ended]
) -> Ended | None:
    """Runs one process to its end; returns the case that it has not survived, if there is one."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "multilora_kernels.trial.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(request.encode() + "\n")
            process.stdin.flush()
            lines = _Lines(process.stdout)
            left = deadline - time.monotonic()
            first = lines.next(min(limits.start, left))
            if first is None:
                if left < limits.start:
                    raise TrialError(f"it took more than {limits.trial:.0f} s")
                raise TrialError(f"its process was not ready within {limits.start:.0f} s")
            if first != f"{READY}\n":
                process.wait(_KILL_SECONDS)
                raise TrialError(_last_words(process, errors))
            begun: Begun | None = None
            while True:
                left = deadline - time.monotonic()
                line = lines.next(min(limits.case, left))
                if line is None:
                    if left < limits.case or begun is None:
                        raise TrialError(f"it took more than {limits.trial:.0f} s")
                    problem = f"no result within {limits.case:.0f} s"
                    return Ended(begun.kind, begun.backend, begun.rows, problem)
                if not line:
                    process.wait(_KILL_SECONDS)
                    if process.returncode == 0:
                        return None
                    if process.returncode == OUT_OF_MEMORY:
                        raise TrialError("the device has no room for it")
                    if begun is None:
                        last = ended[-1] if ended else None
                        if last is None or not last.problem:
                            raise TrialError(_last_words(process, errors))
                        return ended.pop()  # it has ended itself after a fault
                    problem = f"its process ended ({_status(process)})"
                    return Ended(begun.kind, begun.backend, begun.rows, problem)
                event = decode_event(line)
                if isinstance(event, Begun):
                    begun = event
                else:
                    ended.append(event)
                    begun = None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TrialError(f"its process cannot be used: {error}") from error
        finally:
            _end(process)


class _Lines:
    """A pipe's lines, with time limits."""

    def __init__(self, pipe: IO[str]) -> None:
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(pipe,), daemon=True).start()

    def _read(self, pipe: IO[str]) -> None:
        for line in _until_closed(pipe):
            self._lines.put(line)
        self._lines.put("")

    def next(self, seconds: float) -> str | None:
        """The next line; empty at the end, None where none comes in time."""
        try:
            return self._lines.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            return None


def _until_closed(pipe: IO[str]) -> Iterator[str]:
    try:
        yield from pipe
    except ValueError:  # closed by the thread that has ended the process
        return


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    try:
        process.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning("The process %d of a kernel that hangs does not end yet.", process.pid)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and process.returncode is not None:
            pipe.close()


def _status(process: subprocess.Popen[str]) -> str:
    code = process.returncode
    return f"signal {-code}" if code is not None and code < 0 else f"status {code}"


def _last_words(process: subprocess.Popen[str], errors: IO[str]) -> str:
    errors.seek(0)
    said = [line.strip() for line in errors if line.strip()]
    last = f": {said[-1][:300]}" if said else ""
    return f"its process ended before a case began ({_status(process)}){last}"
