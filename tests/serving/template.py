"""Processes that have imported vLLM, for servers and engines of tests: most of a start is imports.

One process imports what vLLM's processes import before they load plugins, and does nothing else.
What `multiprocessing` is asked to spawn is forked from it, instead of being a new interpreter, and
gets what a new interpreter would get: environment, standard streams, arguments, descriptors. Before
it does anything, it forks a template of its own, for the processes that it will start itself: so
parents, process groups and memory are what they are without templates.
"""

import atexit
import gc
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, popen_forkserver, popen_spawn_posix, resource_tracker
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import values

# Not what is imported after plugins are loaded: patches may have to be there first.
_IMPORTS = (
    "setproctitle",  # finds where titles go only before the environment is changed
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.openai",
    "vllm.entrypoints.cli.run_batch",
    "vllm.entrypoints.cli.serve",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    __name__,
)

# Read when modules are imported: with other values of these a process has to import for itself.
# Not LD_PRELOAD and LD_LIBRARY_PATH, which vLLM and OpenCV set for libraries that are loaded then.
_READ_ON_IMPORT = ("OMP_", "PYTHON", "TRITON_INTERPRET")

_STREAMS = (1, 2)
_MOMENT_S = 0.0005

NAME = "template"
"""As psutil has it, the name of a template that belongs to a process of vLLM."""

Process = popen_forkserver.Popen
"""A running process: `pid`, `poll`, `wait` and `returncode`, as those of `subprocess.Popen`."""


def _read_on_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_ON_IMPORT)}


_READ = _read_on_import(os.environ)

# In the template: what the imports have set, for whatever is started later.
_INITIAL = Path("/proc/self/environ").read_text(errors="replace").split("\0")
_BEFORE = {entry.partition("=")[0] for entry in _INITIAL}
_SET_BY_IMPORTS = {name: value for name, value in os.environ.items() if name not in _BEFORE}

# From Python 3.13 on, a forked process is made to forget what imports have registered for its end,
# and with that all finalizers. A new interpreter forgets nothing of what it has imported.
forkserver.atexit = SimpleNamespace(
    _clear=lambda: None, register=lambda _: None, _run_exitfuncs=atexit._run_exitfuncs
)


def changed_since_import(environment: Mapping[str, str]) -> list[str]:
    """The variables by which a process would import other than what the template has imported."""
    entries = _read_on_import(environment).items() ^ _READ.items()
    return sorted({name for name, _ in entries})


def fits(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment would import what the template has imported."""
    return not changed_since_import(environment)


@contextmanager
def forked_processes() -> Iterator[None]:
    """While it lasts, what this process spawns by `multiprocessing` comes from its template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpawnProcess, "_Popen", staticmethod(_start))
        yield


def start_server(arguments: Sequence[str], environment: Mapping[str, str], log: int) -> Process:
    """Runs `vllm` as the leader of a session and process group of its own.

    Args:
        arguments: Of the command.
        environment: One that `fits`.
        log: File descriptor that takes its standard output and error.

    Returns:
        The process, which is its group's leader by now.
    """
    process = SpawnProcess(target=_run_vllm, args=(tuple(arguments),))
    _ensure_template()
    started = Process(_Newborn(process, environment, (log, log), leader=True))
    with suppress(ProcessLookupError):  # it has ended
        while os.getpgid(started.pid) != started.pid:  # signals to its group would be lost
            time.sleep(0.01)
    return started


def is_first(pid: int) -> bool:
    """Whether a process is this one's template, which stays for as long as this one."""
    return pid == forkserver._forkserver._forkserver_pid


def _run_vllm(arguments: tuple[str, ...]) -> None:
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *arguments]
    main()


def _start(process: BaseProcess) -> Any:
    """Starts a process from this process's template, or as a new interpreter where it must be."""
    if not fits(os.environ):
        return popen_spawn_posix.Popen(process)
    _ensure_template()
    return Process(_Newborn(process, os.environ))


def _ensure_template() -> None:
    """In the process of the tests: has the first template import vLLM, if none has."""
    if forkserver._forkserver._forkserver_pid is None:
        multiprocessing.set_forkserver_preload(list(_IMPORTS))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
            forkserver.ensure_running()


class _Newborn:
    """A process on its way to where it will run, with what surrounds it there."""

    def __init__(
        self,
        process: BaseProcess,
        environment: Mapping[str, str],
        streams: tuple[int, int] = _STREAMS,
        *,
        leader: bool = False,
    ) -> None:
        self._name = process._name
        self._process = process
        self._surroundings = dict(environment), streams, leader

    def __reduce__(self) -> tuple[Any, ...]:
        environment, streams, leader = self._surroundings
        # Arguments are made before the state: the process is unpickled in its own environment.
        arguments = environment, [DupFd(stream) for stream in streams], leader
        return _arrive, arguments, {"_process": self._process}

    def _bootstrap(self, parent_sentinel: int) -> int:
        try:
            return self._process._bootstrap(parent_sentinel)
        finally:
            atexit._run_exitfuncs()  # a new interpreter's end would, a fork's does not


def _arrive(environment: Mapping[str, str], streams: Sequence[Any], leader: bool) -> _Newborn:
    """In a forked process: surrounds it by what it would have as a new interpreter."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _keep_imports_out_of_collections()
    Path("/proc/self/comm").write_text("python")
    for stream, handle in zip(_STREAMS, streams, strict=True):
        descriptor = handle.detach()
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(_SET_BY_IMPORTS | dict(environment))
    values.ValueClass = values.get_value_class()  # as its import would, by PROMETHEUS_MULTIPROC_DIR
    _wait_without_spinning()
    if leader:
        os.setsid()
        # Its own, which removes what is left of the shared memory of the group's processes.
        os.close(resource_tracker._resource_tracker._fd)
        resource_tracker._resource_tracker._fd = None
    _fork_template()
    SpawnProcess._Popen = staticmethod(_start)
    return _Newborn.__new__(_Newborn)


def _keep_imports_out_of_collections() -> None:
    """Has the collections that vLLM asks for at its start and end look at what is new alone.

    What has been imported is most of what there is, and stays.
    """
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def _wait_without_spinning() -> None:
    """Has vLLM's processes sleep for moments while they wait for each other.

    With more of them than cores, those that spin take the time of those that compute.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = lambda: time.sleep(_MOMENT_S)


def _fork_template() -> None:
    """Forks the template of the processes that this one will start."""
    folder = tempfile.mkdtemp(prefix="multilora-template-")
    address = f"{folder}/socket"
    alive, held = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        pid = os.fork()
        if pid == 0:
            try:
                _serve_forks(listener, alive)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)
    os.close(alive)
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd = address, held
    server._forkserver_pid = pid


def _serve_forks(listener: socket.socket, alive: int) -> None:
    """Forks when asked, until no process is left that might ask."""
    kept = {0, *_STREAMS, alive, listener.fileno()}
    for entry in Path("/proc/self/fd").iterdir():
        if int(entry.name) not in kept:
            with suppress(OSError):  # the folder's own descriptor
                os.close(int(entry.name))
    Path("/proc/self/comm").write_text(NAME)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the processes of its group
    with suppress(SystemExit):
        forkserver.main(listener.detach(), alive, [])
