"""Where the LoRA metrics are recorded, and how they get into vLLM's own `/metrics`.

The process that starts an engine makes a folder if vLLM's statistics are on. Its engine core and
the worker of rank 0 find it by the engine's instance and record into it; every API server shows
what is there. With `--disable-log-stats` there is no folder, and nothing is recorded or shown.
"""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Metric

from vllm_multilora.integration.activation import kernel_backend, settings_of
from vllm_multilora.metrics import route_counts
from vllm_multilora.metrics.collector import LoRACollector
from vllm_multilora.metrics.folder import create_folder, find_folder, parent_folder, remove_folder
from vllm_multilora.metrics.recorder import Recorder

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "MULTILORA_METRICS_FOLDER"
"""Tells several API servers of one `vllm serve` where the folder is: each has made a
configuration of its own, with another instance in it than the engines'."""

_COLLECTOR = LoRACollector()

# vLLM gives each of an engine's data-parallel parts under Ray its own suffix.
_PART = re.compile(r"_dp\d+$")


def make_folder(vllm_config: VllmConfig) -> None:
    """Makes the folder of an engine that this process is about to start.

    It is removed with the configuration, at the latest when this process ends.
    """
    parallel = vllm_config.parallel_config
    if parallel._api_process_count > 1 and parallel._api_process_rank >= 0:
        return  # one of several API servers; the process that started them has made it
    try:
        folder = create_folder(vllm_config.instance_id, parent_folder())
    except OSError as error:
        logger.warning("There will be no LoRA metrics: no folder for them can be made: %s", error)
        return
    weakref.finalize(vllm_config, _remove, folder, os.getpid())
    os.environ[FOLDER_VARIABLE] = str(folder)


def _remove(folder: Path, maker: int) -> None:
    # Not in a forked child, which has the maker's finalizers too.
    if os.getpid() == maker:
        remove_folder(folder)


def _find_folder(vllm_config: VllmConfig) -> Path | None:
    return find_folder(_PART.sub("", vllm_config.instance_id), parent_folder())


def engine_recorder(vllm_config: VllmConfig) -> Recorder | None:
    """What an engine core records with; None where nothing is recorded."""
    return _recorder(vllm_config, "engine", _find_folder(vllm_config))


def worker_recorder(vllm_config: VllmConfig) -> Recorder | None:
    """What a worker records with; None where nothing is recorded, or another worker reports."""
    if vllm_config.parallel_config.rank != 0:
        return None
    return _recorder(vllm_config, "worker", _find_folder(vllm_config))


def _recorder(vllm_config: VllmConfig, role: str, folder: Path | None) -> Recorder | None:
    if folder is None:
        return None
    is_server = role == "server"
    try:
        return Recorder(
            folder,
            role=role,
            engine="" if is_server else str(vllm_config.parallel_config.data_parallel_index),
            model_name=str(vllm_config.model_config.served_model_name),
            max_adapters=settings_of(vllm_config).metrics_max_adapters,
        )
    except OSError as error:
        logger.warning("This process records no LoRA metrics: %s", error)
        return None


def show(vllm_config: VllmConfig) -> None:
    """Shows an engine's metrics in this process, its client; the newest engine's are shown."""
    if kernel_backend(vllm_config) == "vllm":
        return
    folder = _find_folder(vllm_config)
    if folder is None and (path := os.environ.get(FOLDER_VARIABLE)):
        folder = Path(path)
    if folder is None:
        return
    _COLLECTOR.show(folder)
    route_counts.COUNTS.start(partial(_recorder, vllm_config, "server", folder))
    known: Any = REGISTRY
    if _COLLECTOR not in known._collector_to_names:
        REGISTRY.register(_COLLECTOR)


def shown_beside(collector: Any) -> Iterable[Metric]:
    """What is shown beside the values of several API servers: nothing beside anybody else's."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return _COLLECTOR.collect() if folder and collector._path == folder else ()
