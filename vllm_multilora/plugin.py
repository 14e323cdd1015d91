"""The entry points that vLLM calls; all the work is in `integration/`."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Entry point of `vllm.general_plugins`: runs in every vLLM process, perhaps repeatedly.

    An exception that leaves this function ends vLLM's start, and nothing is caught here: without
    the plugin, a server that was to ask for keys would ask for none.
    """
    from vllm_multilora.integration.logs import join_vllm_logging
    from vllm_multilora.integration.patching.tables.ledger import apply_patches
    from vllm_multilora.integration.updating import restore_updating

    join_vllm_logging()
    restore_updating()
    apply_patches()
