"""Metrics and the states of adapters on a port of an engine's own (`--multilora-status-port`).

For engines that no HTTP server of vLLM's serves: in Dynamo, in Ray Serve, of `LLM(...)`.
`GET /metrics` and `GET /v1/lora_adapters` answer as vLLM's server does with this plugin, so that
Prometheus, `vllm-multilora status` and `vllm-multilora advise` can read them. No key is asked for:
whoever reaches the port sees the names, folders and counts of all adapters.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.integration.engine.adapter_status import TIERS, Report
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.recording import folder_of
from vllm_multilora.metrics.collector import LoRACollector

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

ADAPTERS = "/v1/lora_adapters"

TIME_LIMIT_S = 30.0
"""How long an answer waits for the engine's running step, which ends much sooner."""


def serve_status(vllm_config: VllmConfig, report: Callable[[], Future[list[Report]]]) -> None:
    """Opens the port that an engine's settings name, until the engine ends.

    With data parallelism, each engine adds its index to the port.

    Args:
        vllm_config: Of the engine.
        report: A method that asks the engine for its report, from any thread; its object's end is
            the engine's.

    Raises:
        MultiLoRAError: The engine cannot listen there.
    """
    address = settings_of(vllm_config).status_port
    if address is None:
        return
    host, _, text = address.rpartition(":")
    port = int(text) + vllm_config.parallel_config.data_parallel_index
    try:
        server = _Server((host or "127.0.0.1", port), report, folder_of(vllm_config))
    except OSError as error:
        raise MultiLoRAError(
            f"--multilora-status-port {address}: the engine cannot listen on port {port} "
            f"({error.strerror}): name one that is free"
        ) from error
    Thread(target=server.serve_forever, name="multilora-status", daemon=True).start()
    weakref.finalize(report.__self__, server.shutdown)  # type: ignore[attr-defined]
    logger.info("Metrics and the states of adapters: http://%s:%d", host or "127.0.0.1", port)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        report: Callable[[], Future[list[Report]]],
        metrics: Path | None,
    ) -> None:
        super().__init__(address, _Handler)
        self._report = weakref.WeakMethod(report)
        self.registry, collector = CollectorRegistry(), LoRACollector()
        self.registry.register(collector)
        if metrics is not None:
            collector.show(metrics)
            collector.show_lists()

    def adapters(self) -> dict[str, Any]:
        """The answer of `ADAPTERS`; raises whatever keeps the engine from answering."""
        if (report := self._report()) is None:
            raise MultiLoRAError("it has ended")
        (found,) = report().result(TIME_LIMIT_S)
        rows = [
            {"id": row["name"], "object": "lora_adapter", "tier": TIERS.get(row["state"], "disk")}
            | row
            for row in found["adapters"]
        ]
        shown = {key: found[key] for key in ("slots", "cpu", "kernels") if found[key]}
        return {"object": "list", "data": sorted(rows, key=lambda row: row["id"]), **shown}


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        path, status, kind = self.path.partition("?")[0], HTTPStatus.OK, "application/json"
        if path == "/metrics":
            body, kind = generate_latest(self.server.registry), CONTENT_TYPE_LATEST
        elif path == ADAPTERS:
            try:
                body = json.dumps(self.server.adapters()).encode()
            except Exception as error:
                status = HTTPStatus.SERVICE_UNAVAILABLE
                body = _error(f"the engine does not answer: {error!r}")
        else:
            status = HTTPStatus.NOT_FOUND
            body = _error(f"nothing is at this path: ask for /metrics or {ADAPTERS}")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing: Prometheus asks every few seconds."""


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()
