"""Sends this project's log lines to vLLM's log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

_PROJECT = ("vllm_multilora", "multilora_kernels")


def join_vllm_logging() -> None:
    """Makes the project's loggers children of vLLM's.

    They have its handlers and its level from then on, whenever vLLM sets them: newer versions do
    so long after they have loaded their plugins.
    """
    vllm_logger = logging.getLogger("vllm")
    for name in _PROJECT:
        logging.getLogger(name).parent = vllm_logger


def configure_loggers(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    original(*args, **kwargs)
    for name, known in logging.root.manager.loggerDict.items():
        if isinstance(known, logging.Logger) and name.partition(".")[0] in _PROJECT:
            known.disabled = False
