"""A server of HTTP answers, for the commands that ask one."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

Answer = tuple[int, str]


@dataclass
class Site:
    """Answers by path; each is called with the query and the headers, or with what is posted."""

    url: str
    server: ThreadingHTTPServer
    answers: dict[str, Callable[[dict[str, str], dict[str, str]], Answer]] = field(
        default_factory=dict
    )
    posts: dict[str, Callable[[dict[str, object]], Answer]] = field(default_factory=dict)


@pytest.fixture
def site() -> Iterator[Site]:
    """An HTTP server on a port of its own that answers as the test says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            answer = found.answers.get(parts.path, lambda *_: (404, '{"detail":"Not Found"}'))
            self._send(*answer(query, dict(self.headers)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._send(*found.posts[self.path](body))

        def _send(self, status: int, body: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Site(f"http://127.0.0.1:{server.server_port}", server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()
