"""A collector of OpenTelemetry's spans, over HTTP, in a thread of the test's."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

Span = dict[str, str]
"""The attributes of a span that are texts, and its `name`."""

ENVIRONMENT = {
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    "OTEL_BSP_SCHEDULE_DELAY": "200",  # milliseconds
}
LIMIT_S = 60.0


class Collector:
    """The spans that have come.

    Attributes:
        url: Where they are to be sent.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1/traces"
        self._spans: list[Span] = []

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    texts = {one.key: one.value.string_value for one in span.attributes}
                    self._spans.append(texts | {"name": span.name})

    def find(self, wanted: Callable[[Span], bool], count: int) -> list[Span]:
        """The spans that are wanted, once there are so many."""
        deadline = time.monotonic() + LIMIT_S
        while len(found := [span for span in self._spans if wanted(span)]) < count:
            assert time.monotonic() < deadline, self._spans
            time.sleep(0.1)
        return found


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield collector
        finally:
            server.shutdown()
