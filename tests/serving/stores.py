"""The store of an engine or server, from outside: which process it is, and when it has gone."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol import store_folder
from vllm_multilora.store.protocol.messages import Description

_LIMIT_S = 20.0


class _Existing:
    """A store that must be there already."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def connect(self) -> socket.socket:
        return store_folder.connect(self.path)


@contextlib.contextmanager
def observer(path: Path) -> Iterator[StoreClient]:
    """A client that only looks, of the store that listens at a path."""
    client = StoreClient(_Existing(path), "tests", role="observer")
    try:
        yield client
    finally:
        client.close()


def store_process(path: Path) -> psutil.Process:
    """The process of the store that listens at a path, or will soon."""
    deadline = time.monotonic() + _LIMIT_S
    while (process := store_process_now(path)) is None:
        assert time.monotonic() < deadline, f"no store at {path}"
        time.sleep(0.02)
    return process


def store_process_now(path: Path) -> psutil.Process | None:
    """The process of the store that listens at a path; None if none does."""
    with contextlib.suppress(OSError), observer(path) as client:
        client.describe()
        for message in client.poll(_LIMIT_S):
            if isinstance(message, Description):
                return psutil.Process(message.pid)
    return None


def await_end(process: psutil.Process, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    # It is nobody's child here: whoever has to wait for it may be late.
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{process} lives {limit_s} s after it was to end"
        time.sleep(0.05)
