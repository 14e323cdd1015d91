"""Sends this project's log lines to vLLM's log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import product
from typing import Any

_PROJECT = ("vllm_multilora", "multilora_kernels")

_filters: list[logging.Filter] = []


def join_vllm_logging() -> None:
    """Makes the project's loggers children of vLLM's.

    They have its handlers and its level from then on, whenever vLLM sets them: newer versions do
    so long after they have loaded their plugins.
    """
    vllm_logger = logging.getLogger("vllm")
    for name in _PROJECT:
        logging.getLogger(name).parent = vllm_logger


def add_filter(lines: logging.Filter) -> None:
    """Has what vLLM logs in this process pass a filter from now on."""
    if lines not in _filters:
        _filters.append(lines)
    _filter()


def configure_loggers(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    original(*args, **kwargs)
    _filter()
    for name, known in logging.root.manager.loggerDict.items():
        if isinstance(known, logging.Logger) and name.partition(".")[0] in _PROJECT:
            known.disabled = False


def _filter() -> None:
    # Loggers' own filters see nothing of what comes from the loggers below them.
    for handler, lines in product(logging.getLogger("vllm").handlers, _filters):
        handler.addFilter(lines)
