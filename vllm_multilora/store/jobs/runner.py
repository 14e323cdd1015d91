"""How jobs are run: in processes of their own, or on threads if there can be none."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias

from vllm_multilora.failures import FailureKind
from vllm_multilora.store.jobs import sandbox
from vllm_multilora.store.jobs.adapter_reader import AdapterReader
from vllm_multilora.store.jobs.jobs import run_job
from vllm_multilora.store.memory.entries import Load

BACKGROUND_NICENESS = 6
"""Niceness of a job that has worked for long: about a fifth of a processor that the model wants."""

LONGEST_LOG = 1 << 20
"""Bytes of a store's own log; it may be in a folder that is in memory."""

_SIGNALS: dict[int, tuple[str, FailureKind]] = {
    signal.SIGXCPU: ("its processor time was used up", FailureKind.TIMEOUT),
    signal.SIGBUS: (
        "there is no memory for what it packs; where the system has no memfd_create, it lies in "
        "/dev/shm, or else in the temporary folder",
        FailureKind.NO_MEMORY,
    ),
    signal.SIGKILL: (
        "as the kernel does where memory, of a container say, is used up",
        FailureKind.NO_MEMORY,
    ),
    signal.SIGSYS: (
        "a filter of system calls around the server forbids one that checks need",
        FailureKind.INTERNAL,
    ),
}
"""What signals mean that a job gets from the kernel."""


@dataclass(frozen=True)
class End:
    """How a job ended.

    Attributes:
        how: As `was killed by signal 9`.
        kind: What kind of failure that is, if it is one.
    """

    how: str
    kind: FailureKind = FailureKind.INTERNAL


class Use(NamedTuple):
    """What a job does with the processor.

    Attributes:
        processor_s: Processor time that it has used so far.
        is_ready: Whether it runs, or would if it had a processor.
    """

    processor_s: float
    is_ready: bool


RunningJob: TypeAlias = "_Child | _Thread"
Runner: TypeAlias = "ForkRunner | ThreadRunner"


class ForkRunner:
    """Each job in a child of this process, which must have one thread only.

    Args:
        log: Descriptor of the store's own log, where it has one: what jobs say ends up there, and
            it is emptied where that has become much.
    """

    mode = "process"

    def __init__(self, log: int | None = None) -> None:
        self._log = log

    def start(self, load: Load, reader: AdapterReader) -> tuple[RunningJob, socket.socket]:
        """Starts a job; returns it with the store's end of the socket; raises OSError."""
        with contextlib.suppress(OSError):
            if self._log is not None and os.fstat(self._log).st_size > LONGEST_LOG:
                os.ftruncate(self._log, 0)
        return forked(f"job {load.number}", partial(_do_job, load, reader))

    def protection(self) -> list[str]:
        """What keeps jobs in bounds."""
        return ["a process of its own", *sandbox.protection()]


def forked(
    what: str, work: Callable[[socket.socket], None], kept: Collection[int] = ()
) -> tuple[RunningJob, socket.socket]:
    """Does some work in a child of this process, which must have one thread only; raises OSError.

    The child has one end of a socket, and `kept` descriptors; `what` is what the log calls it.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            raise
        if pid == 0:
            _be_child(theirs, what, work, kept)
    return _Child(pid), ours


def _be_child(
    sock: socket.socket, what: str, work: Callable[[socket.socket], None], kept: Collection[int]
) -> None:
    """The whole life of a child; never returns."""
    code = 1
    try:
        os.setsid()  # Linux may share processors among sessions: this one has a priority of its own
        gc.disable()  # a collection would touch, and so copy, the store's objects; a job ends soon
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        # Whatever a hostile file makes of this process, it holds nothing of the store's.
        _close_all_but(sorted((sock.fileno(), *kept)))
        work(sock)
        code = 0
    except BaseException as error:
        print(f"multilora store: {what}: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)  # also where nothing can be printed: nobody else may go on as the store


def _do_job(load: Load, reader: AdapterReader, sock: socket.socket) -> None:
    settings = load.settings
    roots = (*settings.allowed_roots, *settings.directories) if settings.allowed_roots else ()
    confine = partial(
        sandbox.enter, roots, settings.timeout_s, files_in_memory=settings.allow_pickle
    )
    run_job(sock, load, reader, confine)


def _close_all_but(kept: Sequence[int]) -> None:
    """Closes all descriptors but some, in order, and those of standard streams.

    Above the first only those that there are, if the system tells: where Python was built for older
    Linuxes, `os.closerange` tries each up to the limit, and that may be a billion in a container.
    """
    os.closerange(3, kept[0])  # which also makes room for the listing's
    try:
        names = os.listdir("/proc/self/fd")  # noqa: PTH208 (of numbers)
    except OSError:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        for last, end in pairwise((*kept, most)):
            os.closerange(last + 1, end)
        return
    for number in map(int, names):
        if number > kept[0] and number not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(number)


class _Child:
    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended: End | None = None

    def kill(self) -> None:
        """Ends it, if anything can; may be called again."""
        if self.gone() is None:
            os.kill(self._pid, signal.SIGKILL)

    def gone(self) -> End | None:
        """None while it may still write; then how it ended."""
        if self._ended is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = self._pid, 0
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._ended = _killed(-code) if code < 0 else End(f"ended with code {code}")
        return self._ended

    def use(self) -> Use:
        return _use(f"/proc/{self._pid}")

    def yield_processors(self) -> bool:
        """Lowers its priority below the model's; False where that has to be tried again."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._pid, BACKGROUND_NICENESS)
        # Where Linux shares processors among sessions, a session's niceness counts and not its
        # processes'.
        try:
            Path(f"/proc/{self._pid}/autogroup").write_text(str(BACKGROUND_NICENESS))
        except BlockingIOError:  # one change a tenth of a second, of all users together
            return False
        except OSError:  # this kernel has no such groups, or the job has ended
            pass
        return True


def _killed(number: int) -> End:
    why, kind = _SIGNALS.get(number, ("", FailureKind.INTERNAL))
    return End(f"was killed by signal {number}" + (f" ({why})" if why else ""), kind)


class ThreadRunner:
    """Each job on a thread of this process: nothing can end it, and it is restricted in nothing."""

    mode = "thread"

    def start(self, load: Load, reader: AdapterReader) -> tuple[RunningJob, socket.socket]:
        ours, theirs = socket.socketpair()
        try:
            return _Thread(theirs, load, reader), ours
        except RuntimeError as error:  # as Python says it, whatever the system's error was
            ours.close()
            theirs.close()
            raise OSError(errno.EAGAIN, str(error)) from error

    def protection(self) -> list[str]:
        return []


class _Thread:
    def __init__(self, theirs: socket.socket, load: Load, reader: AdapterReader) -> None:
        name = f"multilora-job-{load.number}"
        self._thread = threading.Thread(
            target=run_job, args=(theirs, load, reader), name=name, daemon=True
        )
        self._thread.start()

    def kill(self) -> None:
        """Its next word to the store fails, and ends it."""

    def gone(self) -> End | None:
        return None if self._thread.is_alive() else End("ended")

    def use(self) -> Use:
        return _use(f"/proc/self/task/{self._thread.native_id}")

    def yield_processors(self) -> bool:
        """A thread stays as it is: it holds the interpreter, for which the model's own wait."""
        return True


def _use(folder: str) -> Use:
    try:
        state, *fields = _read(f"{folder}/stat").rpartition(b")")[2].split()
        seconds = (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return Use(0.0, is_ready=False)
    with contextlib.suppress(OSError, ValueError, IndexError):
        seconds = int(_read(f"{folder}/schedstat").split()[0]) / 1e9  # finer
    return Use(seconds, is_ready=state == b"R")


def _read(path: str) -> bytes:
    """What a short file says; `Path.read_bytes` takes three times as long, and jobs are many."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
