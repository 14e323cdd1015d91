"""A server with the status page, and a listing that a test writes."""

from __future__ import annotations

import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import msgspec

from vllm_multilora.gateway.status.page import headers, page

GIB = 2**30


def row(name: str, number: int, state: str = "absent", **others: Any) -> dict[str, Any]:
    """An adapter as the status route tells of it."""
    tier = {"slot": "gpu", "host": "cpu"}.get(state, "disk")
    return {
        "id": name,
        "object": "lora_adapter",
        "int_id": number,
        "path": f"/adapters/{number}",
        "state": state,
        "tier": tier,
        "slot": None,
        "kind": "lora",
        "parts": None,
        "rank": 16,
        "digest": f"{number:064x}",
        "loaded": None,
        "bytes": 0 if tier == "disk" else 40 << 20,
        "pinned": False,
        "requests": 0,
        "hits": 0,
        "loads": 0,
        "last_used": None,
        "last_error": None,
        **others,
    }


def listing(rows: list[dict[str, Any]], slots: int = 4, **others: Any) -> dict[str, Any]:
    """What the status route answers."""
    held = [one for one in rows if one["slot"] is not None]
    loaded = [one["bytes"] for one in rows if one["bytes"]]
    memory = {"adapters": len(loaded), "bytes": sum(loaded)}
    return {
        "object": "list",
        "data": rows,
        "slots": {"total": slots, "free": slots - len(held)},
        "cpu": {**memory, "bytes_limit": 8 * GIB, "adapters_limit": None},
        **others,
    }


class StubServer:
    """Answers with the page and a listing; a context manager.

    Args:
        answer: The listing.
        key: What the listing needs; nothing where there is none.

    Attributes:
        answer: The listing from now on.
        status: Of the listing's answers.
        tag: Of the listing; the same one for the same answer again.
        keys: The keys that came, None for none.
    """

    def __init__(self, answer: dict[str, Any], key: str | None = None) -> None:
        self.answer = answer
        self.status = HTTPStatus.OK
        self.tag: str | None = None
        self.keys: list[str | None] = []
        self._key = key

    def __enter__(self) -> Self:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/multilora":
                    self._send(HTTPStatus.OK, page().encode(), {**headers(), **HTML})
                elif self.path == "/v1/lora_adapters":
                    sent = self.headers.get("authorization")
                    stub.keys.append(sent and sent.removeprefix("Bearer "))
                    is_known = stub._key is None or stub.keys[-1] == stub._key
                    status = stub.status if is_known else HTTPStatus.UNAUTHORIZED
                    body = stub.answer if status == HTTPStatus.OK else {"detail": "no answer"}
                    tag = {} if stub.tag is None else {"etag": stub.tag}
                    self._send(status, msgspec.json.encode(body), {**JSON, **tag})
                else:
                    self._send(HTTPStatus.NOT_FOUND, b"{}", JSON)

            def _send(self, status: HTTPStatus, body: bytes, more: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**more, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/multilora"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def close(self) -> None:
        """Ends it: nobody answers any more."""
        self.__exit__(None, None, None)

    def wait_for_call(self, limit_s: float = 30.0) -> None:
        """Waits until the listing has been asked for once more."""
        before, deadline = len(self.keys), time.monotonic() + limit_s
        while len(self.keys) == before:
            assert time.monotonic() < deadline, "nobody asks"
            time.sleep(0.02)


HTML = {"content-type": "text/html; charset=utf-8"}
JSON = {"content-type": "application/json"}
