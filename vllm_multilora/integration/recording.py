"""Where the processes of an engine record the LoRA metrics.

The process that starts an engine creates a folder, if vLLM's statistics are on. Its engine core
finds the folder by the engine's instance and records into it, and every API server reports what is
in it (`server.requests.metrics_route`). With `--disable-log-stats` there is no folder, and nothing
is recorded or reported.
"""

from __future__ import annotations

import logging
import os
import re
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.metrics.recorder import Recorder
from vllm_multilora.metrics.request_lists import RequestLists
from vllm_multilora.metrics.value_folder import (
    create_folder,
    find_folder,
    parent_folder,
    remove_folder,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "MULTILORA_METRICS_FOLDER"
"""Tells several API servers of one `vllm serve` where the folder is: each has made a
configuration of its own, with another instance in it than the engines'."""

# vLLM gives each of an engine's data-parallel parts under Ray its own suffix.
_PART = re.compile(r"_dp\d+$")


def server_of(vllm_config: VllmConfig) -> str:
    """What the processes of one server call it."""
    return _PART.sub("", vllm_config.instance_id)


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


def folder_of(vllm_config: VllmConfig) -> Path | None:
    """The folder of an engine; None where nothing is recorded."""
    return find_folder(server_of(vllm_config), parent_folder())


def engine_recorder(vllm_config: VllmConfig) -> Recorder | None:
    """What an engine core records with; None where nothing is recorded."""
    return recorder(vllm_config, "engine", folder_of(vllm_config))


def request_lists(vllm_config: VllmConfig, slots: int) -> RequestLists | None:
    """Where an engine core says which adapters have requests; None where nothing is recorded."""
    folder, engine = folder_of(vllm_config), vllm_config.parallel_config.data_parallel_index
    return None if folder is None else RequestLists(folder, engine, slots)


def recorder(vllm_config: VllmConfig, role: str, folder: Path | None) -> Recorder | None:
    """What a process records with; None where nothing is recorded."""
    if folder is None:
        return None
    is_server, settings = role == "server", settings_of(vllm_config)
    try:
        return Recorder(
            folder,
            role=role,
            engine="" if is_server else str(vllm_config.parallel_config.data_parallel_index),
            model_name=str(vllm_config.model_config.served_model_name),
            max_adapters=settings.metrics_max_adapters,
            has_latencies=is_server and settings.latency_metrics,
        )
    except OSError as error:
        logger.warning("This process records no LoRA metrics: %s", error)
        return None
