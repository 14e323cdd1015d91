"""A web server of the tests' own: files with ETags and ranges, and all that goes wrong with them.

It answers as object stores and as the Hugging Face hub do, too: what is at `/bucket/folder/file`
is `s3://bucket/folder/file` for who has it for an endpoint.
"""

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


@dataclass
class Fault:
    """What goes wrong with the next requests for a file.

    `kind`: `status` (of `value`), `delay` (of so many seconds), `cut` (after so many bytes the
    connection ends), `reset` (likewise, with a reset), `stall` (nothing comes after so many),
    `length` (so many bytes more are promised than were listed), `redirect` (to an address).
    """

    method: str
    name: str
    kind: str
    value: int | float | str = 0
    times: int = 1


@dataclass
class Served:
    """A request that was answered: its method, path, and the first byte of its range."""

    method: str
    path: str
    begin: int
    if_match: str | None
    authorization: str | None


@dataclass
class WebServer:
    """Files by path, faults, and what was asked for."""

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    pause_s: float = 0.0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(self, path: str, folder: Path) -> None:
        """Puts an adapter's files below a path, beside others that nobody needs."""
        for file in folder.iterdir():
            self.files[f"{path}/{file.name}"] = file.read_bytes()
        self.files[f"{path}/optimizer.pt"] = bytes(1 << 20)

    def gets(self, name: str = "") -> list[Served]:
        """The downloads of files whose path ends like this."""
        return [one for one in self.served if one.method == "GET" and one.path.endswith(name)]


def _handler(server: WebServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            begin, end = self._range()
            headers = self.headers
            server.served.append(
                Served(self.command, path, begin, headers["If-Match"], headers["Authorization"])
            )
            fault = self._fault(path)
            if fault is not None and fault.kind == "status":
                self._send(int(fault.value), b"<Error><Code>AccessKeySECRET</Code></Error>")
                return
            if fault is not None and fault.kind == "redirect":
                self.send_response(302)
                self.send_header("Location", str(fault.value))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault is not None and fault.kind == "delay":
                time.sleep(float(fault.value))
            content = self._content(path)
            if content is None:
                self._send(404, b"")
                return
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            if headers["If-Match"] not in (None, etag):
                self._send(412, b"")
                return
            part = content[begin:end]
            self.send_response(206 if headers["Range"] else 200)
            if headers["Range"]:
                last = begin + len(part) - 1
                self.send_header("Content-Range", f"bytes {begin}-{last}/{len(content)}")
            more = int(fault.value) if fault is not None and fault.kind == "length" else 0
            self.send_header("Content-Length", str(len(part) + more))
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", "Wed, 02 Dec 2026 10:00:00 GMT")
            self.end_headers()
            if self.command == "GET":
                self._write(part, fault)

        def _content(self, path: str) -> bytes | None:
            if path.startswith("/api/models/"):
                repository = "/".join(path.split("/")[3:5])
                inside = f"/{repository}/"
                found = {n.removeprefix(inside): c for n, c in server.files.items()}
                siblings = [
                    {"rfilename": name, "size": len(content)}
                    for name, content in found.items()
                    if not name.startswith("/")
                ]
                return (
                    json.dumps({"sha": COMMIT, "siblings": siblings}).encode() if siblings else None
                )
            return server.files.get(path.replace(f"/resolve/{COMMIT}/", "/"))

        def _range(self) -> tuple[int, int | None]:
            if not (text := self.headers["Range"]):
                return 0, None
            first, _, last = text.removeprefix("bytes=").partition("-")
            return int(first), int(last) + 1 if last else None

        def _fault(self, path: str) -> Fault | None:
            for fault in server.faults:
                if fault.method == self.command and path.endswith(fault.name) and fault.times:
                    fault.times -= 1
                    return fault
            return None

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def _write(self, content: bytes, fault: Fault | None) -> None:
            broken = fault is not None and fault.kind in ("cut", "reset", "stall")
            content = content[: int(fault.value)] if fault is not None and broken else content
            for at in range(0, len(content), 1 << 16):
                self.wfile.write(content[at : at + (1 << 16)])
                time.sleep(server.pause_s)
            self.wfile.flush()
            if fault is not None and fault.kind == "stall":
                self.connection.recv(1)  # until the client has gone
            if fault is not None and fault.kind == "reset":
                time.sleep(0.2)  # what was sent is to arrive first
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            if broken or (fault is not None and fault.kind == "length"):
                self.close_connection = True

    return Handler


@contextmanager
def web_server() -> Iterator[WebServer]:
    """A server on a port of its own."""
    server = WebServer()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    listening.daemon_threads = True
    server.port = listening.server_port
    serve: Callable[[], None] = listening.serve_forever
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
