"""Adds the LoRA metrics to vLLM's own `/metrics`: their folder, and who reports it.

The process that starts an engine makes the folder if vLLM's statistics are on, and every API
server shows what is there; see `integration.recording` for who records into it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Gauge, generate_latest
from starlette.responses import Response
from starlette.routing import Route
from vllm.v1.metrics.prometheus import get_prometheus_registry

from vllm_multilora.integration.api_server.failure_delivery import AFTER_OUTPUTS
from vllm_multilora.integration.recording import FOLDER_VARIABLE, folder_of, recorder
from vllm_multilora.integration.server.settings.gateway_activation import manages_adapters
from vllm_multilora.metrics.collector import Beside, LoRACollector
from vllm_multilora.metrics.recorder import Recorder
from vllm_multilora.metrics.server_counts import COUNTS

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
"""Where vLLM's API servers keep the values of their metrics, if they share them."""

_COLLECTOR = LoRACollector()


def show(vllm_config: VllmConfig) -> None:
    """Shows an engine's metrics in this process, its client; the newest engine's are shown."""
    if not manages_adapters(vllm_config):
        return
    folder = folder_of(vllm_config)
    if folder is None and (path := os.environ.get(FOLDER_VARIABLE)):
        folder = Path(path)
    if folder is None:
        return
    _COLLECTOR.show(folder)
    COUNTS.start(partial(_recorder, weakref.ref(vllm_config), folder))
    known: Any = REGISTRY
    if _COLLECTOR not in known._collector_to_names:
        REGISTRY.register(_COLLECTOR)


def _recorder(config: weakref.ref[VllmConfig], folder: Path) -> Recorder | None:
    """What this process counts with, as long as the engine is there, and its folder with it."""
    vllm_config = config()
    return None if vllm_config is None else recorder(vllm_config, "server", folder)


def add_routes(app: FastAPI) -> None:
    """Adds the LoRA metrics to `/metrics` of one of several API servers.

    There vLLM's route reads the files of all servers into a new registry for each answer, which
    nobody else can register with. So a route of ours comes before it.
    """
    if _MULTIPROCESS not in os.environ:
        return  # vLLM shows the registry that the metrics are in
    shown: Any = Beside(_COLLECTOR, get_prometheus_registry())

    def show_all(_: Request) -> Response:
        return Response(generate_latest(shown), media_type=CONTENT_TYPE_LATEST)

    paths = "/metrics", "/metrics/"
    app.routes[:0] = [Route(path, show_all, include_in_schema=False) for path in paths]


def hide_stock_lists(client: Any) -> None:
    """Shows the engines' own lists of adapters with requests in the place of vLLM's.

    vLLM's makes a series of every pair of lists that has ever been, and does not know which
    adapters' requests wait. It is left with one pair, of empty lists.
    """
    manager = getattr(client, "logger_manager", None)  # there is none without statistics
    for stats in [] if manager is None or _COLLECTOR.folder is None else manager.stat_loggers:
        if isinstance(gauge := getattr(stats, "gauge_lora_info", None), Gauge):  # else it is Ray's
            with contextlib.suppress(KeyError):  # values in files are shown by another registry
                REGISTRY.unregister(gauge)
            _COLLECTOR.show_lists()
            processor = client.output_processor
            AFTER_OUTPUTS.set(processor, processor.lora_states.requests.clear)
