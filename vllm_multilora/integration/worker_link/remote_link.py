"""Connections from workers on other machines to their engine core, over TCP.

The engine core listens while it runs. Its workers learn the address and a key from one of vLLM's
calls, which reaches all machines. A client says what it connects for and proves that it has the
key; all others are disconnected. What follows is neither encrypted nor signed, like vLLM's own
traffic between machines, so both belong on a network that no tenant can access.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from vllm_multilora.store.protocol.store_folder import kernel, store_folder
from vllm_multilora.store.store_launch import FIRST_PAUSE_S, LONGEST_PAUSE_S, StoreHost

logger = logging.getLogger(__name__)

Purpose: TypeAlias = Literal["fills", "store"]

_GREETING = struct.Struct("<8sI32s")  # purpose, rank, proof
_MAX_SILENT = 64
_SILENT_LIMIT_S = 10.0
_CONNECT_LIMIT_S = 10.0


class LinkAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where an engine core listens, and what opens its door."""

    host: str
    port: int
    key: bytes


@dataclass(eq=False)
class _Caller:
    """Someone who has connected and not said everything yet."""

    connection: socket.socket
    since: float
    said: bytes = b""


class RemoteAcceptor:
    """The engine core's end; for its main thread only. Nothing here waits.

    Raises:
        OSError: There is no such address here, or no port is free.
    """

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._listener.setblocking(False)
        self.address = LinkAddress(host, self._listener.getsockname()[1], secrets.token_bytes(32))
        self._callers: list[_Caller] = []
        self._open: dict[tuple[str, int], socket.socket] = {}

    def take(self, purpose: Purpose, rank: int) -> socket.socket | None:
        """The newest connection that a worker has made for a purpose, if there is one."""
        self._let_in()
        return self._open.pop((purpose, rank), None)

    def close(self) -> None:
        self._listener.close()
        for connection in (*(caller.connection for caller in self._callers), *self._open.values()):
            connection.close()
        self._callers.clear()
        self._open.clear()

    def _let_in(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody else, or gone again
                break
            connection.setblocking(False)
            self._callers.append(_Caller(connection, time.monotonic()))
        for caller in self._callers[:-_MAX_SILENT]:
            self._hang_up(caller)
        for caller in list(self._callers):
            self._hear(caller)

    def _hear(self, caller: _Caller) -> None:
        try:
            heard = caller.connection.recv(_GREETING.size - len(caller.said))
        except (BlockingIOError, InterruptedError):
            if time.monotonic() - caller.since > _SILENT_LIMIT_S:
                self._hang_up(caller)
            return
        except OSError:
            heard = b""
        caller.said += heard
        if not heard:
            self._hang_up(caller)
        elif len(caller.said) == _GREETING.size:
            purpose, rank, _ = _GREETING.unpack(caller.said)
            name = purpose.rstrip(b"\0").decode(errors="replace")
            if not hmac.compare_digest(caller.said, _greeting(self.address.key, name, rank)):
                logger.warning("Someone without the key connected to the engine core's port.")
                self._hang_up(caller)
                return
            self._callers.remove(caller)
            if (former := self._open.pop((name, rank), None)) is not None:
                former.close()
            self._open[name, rank] = caller.connection

    def _hang_up(self, caller: _Caller) -> None:
        caller.connection.close()
        self._callers.remove(caller)


def dial(address: LinkAddress, purpose: Purpose, rank: int) -> socket.socket:
    """Connects a worker to its engine core.

    Raises:
        OSError: Nobody answers there.
    """
    connection = socket.create_connection((address.host, address.port), _CONNECT_LIMIT_S)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.sendall(_greeting(address.key, purpose, rank))
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


def this_machine() -> str:
    """Tells machines apart by what processes share on one: a kernel, and the folder of the store.

    Containers on one machine count as machines of their own unless they share that folder.
    """
    place = store_folder().stat()
    return f"{kernel()}:{place.st_dev}:{place.st_ino}"


def _greeting(key: bytes, purpose: str, rank: int) -> bytes:
    name = purpose.encode()[:8].ljust(8, b"\0")
    proof = hmac.digest(key, name + rank.to_bytes(4, "little"), "sha256")
    return _GREETING.pack(name, rank, proof)


_READ_BYTES = 64 << 10


class StoreRelay:
    """Connects this machine's store to an engine core on another machine, until the process ends.

    Two threads copy: the engine core talks to this store as to its own. If either side disconnects,
    the other connection is closed, both connect again, and the store is restarted if necessary.

    Raises:
        OSError: The engine core cannot be reached.
    """

    def __init__(self, store: StoreHost, dial: Callable[[], socket.socket]) -> None:
        self._store = store
        self._dial = dial
        threading.Thread(
            target=self._run, args=(dial(),), name="multilora-relay", daemon=True
        ).start()

    def _run(self, engine: socket.socket) -> None:
        pause = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            self._serve(engine)
            if time.monotonic() - began > LONGEST_PAUSE_S:
                pause = FIRST_PAUSE_S
            while True:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                try:
                    engine = self._dial()
                except OSError:
                    continue  # the engine core has ended, and so will this worker
                break

    def _serve(self, engine: socket.socket) -> None:
        """Until either has gone; begins with the first word, as a store expects one at once."""
        with engine, contextlib.suppress(OSError):
            if not engine.recv(1, socket.MSG_PEEK):
                return
            try:
                with self._store.connect() as store:
                    store.settimeout(None)
                    back = threading.Thread(target=_copy, args=(store, engine), daemon=True)
                    back.start()
                    _copy(engine, store)
                    back.join()
            except RuntimeError as error:  # or no thread to copy
                logger.error("No store: %s", error)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_READ_BYTES):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
