"""Finds this user's store, or starts one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import site
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

from vllm_multilora.store.protocol import store_folder
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.store.sources import credentials

if TYPE_CHECKING:
    from vllm_multilora.store.jobs.adapter_reader import AdapterReader

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
"""Between a client's attempts to reach a store: each is twice as long as the one before."""
READER = "vllm_multilora.store.jobs.adapter_reader:AdapterReader"

_KEYS = ("MULTILORA_ADMIN_KEY", "MULTILORA_CACHE_SALT", "VLLM_API_KEY")
"""Variables of servers that no store has. Its jobs have what it has, and read strangers' files."""


class StoreHost(Protocol):
    """Where a client's store is."""

    path: Path

    def connect(self) -> socket.socket:
        """A connection; starts the store where there is none; raises `StoreUnavailableError`."""

    def last_words(self) -> str:
        """What the store has said last, for an error's message."""


class StoreProcess:
    """The store that all servers of this user share.

    A new store inherits the listening socket, so that whoever connects need not wait until it is
    up. What it has to say it writes to a file beside the socket, of the same name but for `.log`,
    which it keeps short.
    """

    def __init__(self, reader: str = READER) -> None:
        self._folder = store_folder.store_folder()
        self._reader = reader
        self.path = store_folder.socket_path(self._folder)
        self._log = self.path.with_suffix(".log")

    def connect(self) -> socket.socket:
        store_folder.ensure(self._folder)
        try:
            return store_folder.connect(self.path)
        except (FileNotFoundError, ConnectionRefusedError):
            return self._started()
        except OSError as error:
            raise StoreUnavailableError(f"{self.path}: {error}") from error

    def last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except OSError as error:
            return f"{self._log}: {error}"
        return lines[-1][-500:] if lines else "nothing"

    def _started(self) -> socket.socket:
        """A connection to a store that is started now, by this process or another one."""
        try:
            with store_folder.locked(self._folder):
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    return store_folder.connect(self.path)
                with store_folder.listen(self.path) as listener:
                    # Not one of standard streams' numbers: those the store gets anew.
                    descriptor = fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, 3)
                try:
                    self._start(descriptor)
                finally:
                    os.close(descriptor)
                return store_folder.connect(self.path)
        except (OSError, subprocess.SubprocessError) as error:
            raise StoreUnavailableError(
                f"the store cannot be started: {error}; `vllm-multilora store` runs it by hand, "
                "and --multilora-store thread does without its process"
            ) from error

    def _start(self, listener: int) -> None:
        options = ["--detach", "--reader", self._reader]
        options += ["--processors", ",".join(map(str, processors()))]
        # Not this process's own output: whoever reads that to its end would wait for the store.
        with self._log.open("a") as log, credentials.handed_over(os.environ) as handed:
            subprocess.run(
                command_line(listener, *options),
                check=True,
                timeout=30,
                pass_fds=(listener, *credentials.handed_descriptors(handed)),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment() | handed,
            )


class RunningStore(StoreProcess):
    """The store of this user that runs already; none is started."""

    def _started(self) -> socket.socket:
        raise StoreUnavailableError(
            f"no store of this user is running (none listens at {self.path}): the first server "
            "with --enable-lora starts one, or `vllm-multilora store`"
        )


class StoreThread:
    """A store on a thread of this process, with checks on threads: nothing can end those."""

    def __init__(self, reader: AdapterReader | None = None) -> None:
        self._reader = reader
        self._thread: threading.Thread | None = None
        self.path = store_folder.own_path(store_folder.store_folder(), "t")

    def connect(self) -> socket.socket:
        try:
            if self._thread is None or not self._thread.is_alive():
                self._start()
            return store_folder.connect(self.path)
        except OSError as error:
            raise StoreUnavailableError(f"{self.path}: {error}") from error

    def _start(self) -> None:
        # Late: a process that has its store elsewhere needs none of this.
        from vllm_multilora.store.jobs.adapter_reader import AdapterReader
        from vllm_multilora.store.jobs.runner import ThreadRunner
        from vllm_multilora.store.server import StoreServer

        reader = self._reader or AdapterReader()
        # What it leaves, another one removes: it ends with its process.
        listener = store_folder.listen_alone(self.path)
        server = StoreServer(listener, ThreadRunner(), reader)
        self._thread = threading.Thread(target=server.run, name="multilora-store", daemon=True)
        self._thread.start()

    def last_words(self) -> str:
        return "nothing: it is a thread of this process, see the log"


def store_host(mode: Literal["process", "thread"]) -> StoreHost:
    """Where this process's store is, or will be."""
    return StoreThread() if mode == "thread" else StoreProcess()


def command_line(listener: int, *options: str) -> list[str]:
    """The command that runs a store at a listening socket, whose descriptor it must inherit."""
    store = [sys.executable, "-P", "-m", "vllm_multilora.store"]
    return [*store, "--socket-fd", str(listener), *options]


def become_store(listener: socket.socket) -> NoReturn:
    """Makes a store of this process, which goes on without clients; raises OSError."""
    listener.set_inheritable(True)
    command = command_line(listener.fileno(), "--keep")
    with credentials.handed_over(os.environ) as handed:
        os.execve(command[0], command, environment() | handed)


def environment() -> dict[str, str]:
    """This process's, in which a store can import what this process can, however it was found.

    Servers' keys and credentials of sources are left out, and so is a path that this process does
    not look at. Where packages are installed, Python looks by itself: before its own modules, one
    there could hide them.
    """
    paths = [] if sys.flags.ignore_environment else [os.environ.get("PYTHONPATH", "")]
    users = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    if (own := str(Path(__file__).parents[2])) not in (*site.getsitepackages(), *users):
        paths.insert(0, own)
    left_out = (*_KEYS, "PYTHONPATH")
    others = credentials.left_out_of(os.environ)
    kept = {name: value for name, value in others.items() if name not in left_out}
    path = os.pathsep.join(filter(None, paths))
    return kept | {"PYTHONPATH": path} if path else kept


def processors() -> list[int]:
    """Where what serves the model may run: here, and where this process's parent may.

    On CPUs vLLM binds a worker's threads to processors, one each, and whatever it starts inherits
    its main thread's, while the processors that vLLM leaves free for such work stay idle. The
    process that started the worker is not bound.
    """
    try:
        return sorted(os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))
    except OSError:
        return []
