"""A flood of wrong keys: as many requests as connections can bring."""

import contextlib
import re
import secrets
import selectors
import socket
import threading
from dataclasses import dataclass
from typing import Any

CONNECTIONS = 40
LIMIT_S = 60.0
_TOGETHER = 200
"""Requests that are sent in one piece, on each connection."""


class Flood:
    """Sends wrong keys for as long as it is entered, hundreds at once on each connection.

    Attributes:
        answered: With 401.
        others: With anything else.
    """

    def __init__(self, port: int) -> None:
        self.answered = self.others = 0
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Flood":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(LIMIT_S)

    def _run(self) -> None:
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            for _ in range(CONNECTIONS):
                connection = socket.create_connection(("127.0.0.1", self._port), timeout=LIMIT_S)
                stack.enter_context(connection)
                known = _Known()
                _send(connection, known)
                selector.register(connection, selectors.EVENT_READ, known)
            while not self._stop.is_set():
                for key, _ in selector.select(0.1):
                    self._read(key.fileobj, key.data)

    def _read(self, connection: Any, known: "_Known") -> None:
        part = connection.recv(1 << 16)
        assert part, "the server has closed the connection"
        text = known.rest + part
        statuses = re.findall(rb"HTTP/1\.1 (\d\d\d) ", text)
        known.rest = text[-12:]  # one byte short of a status line's beginning
        known.awaited -= len(statuses)
        wrong = statuses.count(b"401")
        self.answered += wrong
        self.others += len(statuses) - wrong
        if known.awaited <= 0:
            _send(connection, known)


@dataclass
class _Known:
    """State of a connection: answers still to come, and the last bytes received."""

    awaited: int = 0
    rest: bytes = b""


def _send(connection: socket.socket, known: _Known) -> None:
    known.awaited += _TOGETHER
    connection.sendall("".join(map(_call, range(_TOGETHER))).encode())


def _call(number: int) -> str:
    key = f"Authorization: Bearer sk-{number}-{secrets.token_hex(16)}"
    return "\r\n".join(("GET /v1/models HTTP/1.1", "Host: test", key, "", ""))
