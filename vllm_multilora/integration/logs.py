"""Sends this project's log lines where vLLM's go."""

from __future__ import annotations

import logging

import vllm.logger  # noqa: F401  (configures the "vllm" logger on import)


def join_vllm_logging() -> None:
    """Gives the project's loggers the handlers and the level of vLLM's logger."""
    vllm_logger = logging.getLogger("vllm")
    for name in ("vllm_multilora", "multilora_kernels"):
        own = logging.getLogger(name)
        if not own.handlers:
            own.handlers = list(vllm_logger.handlers)
            own.setLevel(vllm_logger.level)
            own.propagate = vllm_logger.propagate
