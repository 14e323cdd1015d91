"""Connects this machine's store to an engine core on another machine.

Everything is passed on unchanged: the engine core talks to this store as to its own. If either side
disconnects, the relay closes the other connection, connects both again, and restarts the store if
necessary.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from vllm_multilora.store.store_launch import FIRST_PAUSE_S, LONGEST_PAUSE_S, StoreHost

logger = logging.getLogger(__name__)

_READ_BYTES = 64 << 10


class StoreRelay:
    """Two threads that copy, until the process ends.

    Args:
        store: The store of this machine.
        dial: Connects to the engine core; raises `OSError`.

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
                    _relay(engine, store)
            except RuntimeError as error:  # or no thread to copy
                logger.error("No store: %s", error)


def _relay(one: socket.socket, other: socket.socket) -> None:
    """Copies both ways until either end has gone."""
    back = threading.Thread(target=_copy, args=(other, one), daemon=True)
    back.start()
    _copy(one, other)
    back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_READ_BYTES):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
