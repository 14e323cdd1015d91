"""Adds the LoRA metrics to vLLM's own `/metrics`: their folder, and who reports it.

The process that starts an engine makes the folder if vLLM's statistics are on, and every API
server shows what is there; see `integration.recording` for who records into it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from starlette.responses import Response
from starlette.routing import Route
from vllm.v1.metrics.prometheus import get_prometheus_registry

from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.recording import FOLDER_VARIABLE, folder_of, recorder
from vllm_multilora.integration.server.settings.gateway_activation import (
    is_active,
    manages_adapters,
)
from vllm_multilora.metrics.collector import LoRACollector
from vllm_multilora.metrics.recorder import Recorder
from vllm_multilora.metrics.request_lists import RequestLists, labels_of
from vllm_multilora.metrics.server_counts import COUNTS

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

LISTS: Attached[Callable[[int, Any], None] | None] = Attached("lists")
"""What takes the lists of adapters in an engine's statistics, of a `PrometheusStatLogger`; None
where vLLM's own metric does, as it is."""

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
    registry = get_prometheus_registry()
    registry.register(_COLLECTOR)

    def show_all(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    paths = "/metrics", "/metrics/"
    app.routes[:0] = [Route(path, show_all, include_in_schema=False) for path in paths]


def init_stat_loggers(
    original: Callable[..., None], self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any
) -> None:
    original(self, vllm_config, *args, **kwargs)
    show(vllm_config)


def record(
    original: Callable[..., None], stats: Any, scheduler_stats: Any, *args: Any, **kwargs: Any
) -> None:
    """Records a step in vLLM's metrics; of lists of adapters with requests, the newest alone stay.

    They are those of all engines together. vLLM's own makes a series of every pair of lists.
    """
    take = LISTS.get_or_make(stats, partial(_taking_lists, stats))
    original(stats, scheduler_stats, *args, **kwargs)
    if scheduler_stats is not None and take is not None:
        take(kwargs.get("engine_idx") or 0, scheduler_stats)


def _taking_lists(stats: Any) -> Callable[[int, Any], None] | None:
    """What is called with an engine's number and statistics after each step; None: nothing."""
    gauge = stats.gauge_lora_info
    if gauge is None or not is_active(stats.vllm_config):
        return None
    if _MULTIPROCESS not in os.environ:
        is_ours = hasattr(gauge, "_metrics")  # else Ray's
        return partial(_show_newest, gauge, stats.max_lora, {}) if is_ours else None
    if _COLLECTOR.folder is None:
        return None
    stats.gauge_lora_info = None  # its files forget nothing
    return partial(_tell, RequestLists(_COLLECTOR.folder), stats.max_lora)


def _show_newest(
    gauge: Any, slots: int, newest: dict[int, Sequence[Any]], engine: int, scheduler_stats: Any
) -> None:
    lists = scheduler_stats.running_lora_adapters, scheduler_stats.waiting_lora_adapters
    newest[engine] = slots, *map(tuple, lists)
    labels = labels_of(newest.values())
    gauge.labels(**labels).set_to_current_time()
    shown = tuple(labels[name] for name in gauge._labelnames)
    for old in [each for each in gauge._metrics if each != shown]:
        gauge.remove(*old)


def _tell(lists: RequestLists, slots: int, engine: int, scheduler_stats: Any) -> None:
    running = scheduler_stats.running_lora_adapters
    with contextlib.suppress(OSError):  # a server must not fail for what it shows
        lists.tell(engine, slots, running, scheduler_stats.waiting_lora_adapters)
