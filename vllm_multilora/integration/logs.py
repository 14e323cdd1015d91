"""Sends this project's log lines to vLLM's log."""

from __future__ import annotations

import logging


def join_vllm_logging() -> None:
    """Makes the project's loggers children of vLLM's.

    They have its handlers and its level from then on, whenever vLLM sets them: newer versions do
    so long after they have loaded their plugins.
    """
    vllm_logger = logging.getLogger("vllm")
    for name in ("vllm_multilora", "multilora_kernels"):
        logging.getLogger(name).parent = vllm_logger
