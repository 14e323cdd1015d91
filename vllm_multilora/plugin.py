"""The entry points that vLLM calls; everything they do is in `integration/`."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point of `vllm.general_plugins`: runs in every vLLM process, perhaps repeatedly.

    vLLM only logs an exception that leaves this function and goes on without the plugin, so
    nothing is caught here: a fault is seen with its traceback.
    """
    from vllm_multilora.integration.logs import join_vllm_logging
    from vllm_multilora.integration.patches import apply_patches

    join_vllm_logging()
    apply_patches()
