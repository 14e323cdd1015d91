"""``vllm serve`` as a subprocess that is gone when its block ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE

from . import template
from .engine import KV_CACHE_BYTES, environment, store_folder

_TAIL_LINES = 60
_POLL_S = 0.25


class ServerStartError(RuntimeError):
    """The server ended, or said nothing, before it was healthy."""


class VllmServer:
    """A context manager around one ``vllm serve`` process group.

    Args:
        model: Directory of the base checkpoint.
        *args: Further arguments of ``vllm serve``.
        log: File that takes the server's standard output and error.
        env: Environment variables that replace or join this process's. Unless they name a folder of
            stores, or this process's do, the server has a store of its own.
        api_key: What clients must give; requests made here do.
        start_timeout: Seconds until the server has to be healthy.
        stop_timeout: Seconds between SIGTERM and SIGKILL to the process group.
        request_timeout: Seconds until a request has to be answered.
        kv_cache_bytes: Of the KV cache.
        new_interpreter: Whether it is started as by the command line, rather than as a fork of a
            process that has imported vLLM already, which takes a fifth of the time.

    Raises:
        ServerStartError: On entry, with the end of the log.
    """

    def __init__(
        self,
        model: Path,
        *args: str,
        log: Path,
        env: Mapping[str, str] | None = None,
        api_key: str | None = None,
        start_timeout: float = 300.0,
        stop_timeout: float = 30.0,
        request_timeout: float = 120.0,
        kv_cache_bytes: int = KV_CACHE_BYTES,
        new_interpreter: bool = False,
    ) -> None:
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = [
            *("serve", str(model)),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--kv-cache-memory-bytes", str(kv_cache_bytes)),
            *args,
        ]
        key = {"VLLM_API_KEY": api_key} if api_key else {}
        # Tests read the log; commands run in this process may have made vLLM quieter.
        self._env = environment({"VLLM_LOGGING_LEVEL": "INFO", **key, **(env or {})})
        self._store = contextlib.ExitStack()
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        # Straight to the loopback address, whatever proxies the environment names.
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(
            base_url=self.url, timeout=request_timeout, trust_env=False, headers=headers
        )
        self._new_interpreter = new_interpreter or not template.fits(self._env)
        self._process: subprocess.Popen[bytes] | template.Process | None = None

    def __enter__(self) -> Self:
        self._env.setdefault(FOLDER_VARIABLE, self._store.enter_context(store_folder()))
        with self.log.open("wb") as log:
            if self._new_interpreter:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "vllm.entrypoints.cli.main", *self._arguments],
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            else:
                self._process = template.start_server(self._arguments, self._env, log.fileno())
        try:
            self._await_health(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The API server's process id, which is its process group's too."""
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process.pid

    @property
    def store_folder(self) -> Path:
        """Where the server's store is."""
        return Path(self._env[FOLDER_VARIABLE])

    def get(self, path: str) -> httpx.Response:
        """GETs a path of the server; safe to call from several threads."""
        return self._client.get(path)

    def post(self, path: str, json: Mapping[str, Any]) -> httpx.Response:
        """POSTs a JSON body to a path of the server; safe to call from several threads."""
        return self._client.post(path, json=json)

    def log_tail(self) -> str:
        """The log's last lines."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])

    def stop(self) -> None:
        """Ends the whole process group, politely first; does nothing where it has ended."""
        self._client.close()
        if self._process is None:
            return
        group = self._process.pid
        self._signal(group, signal.SIGTERM)
        deadline = time.monotonic() + self._stop_timeout
        while self._group_lives(group) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._signal(group, signal.SIGKILL)
        self._process.wait()
        self._store.close()

    def _await_health(self, process: "subprocess.Popen[bytes] | template.Process") -> None:
        deadline = time.monotonic() + self._start_timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerStartError(
                    f"vllm serve ended with status {process.returncode}; {self.log} ends with:\n"
                    f"{self.log_tail()}"
                )
            with contextlib.suppress(httpx.TransportError):
                if self._client.get("/health", timeout=5.0).status_code == 200:
                    return
            time.sleep(_POLL_S)
        raise ServerStartError(
            f"vllm serve was not healthy after {self._start_timeout} s; {self.log} ends with:\n"
            f"{self.log_tail()}"
        )

    def _group_lives(self, group: int) -> bool:
        # Reaped first: a leader that has ended but not been waited for still counts as alive.
        assert self._process is not None
        self._process.poll()
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        return True

    @staticmethod
    def _signal(group: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


def free_port() -> int:
    """A port of the loopback address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
