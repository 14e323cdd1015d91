"""Checks `--multilora-routes` before an engine is started for it."""

from __future__ import annotations

import logging
from typing import Any

from vllm.usage.usage_lib import UsageContext

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.routing import load_routes

logger = logging.getLogger(__name__)


def check_routes(
    settings: MultiLoRAConfig, engine_args: Any, usage_context: UsageContext | None = None
) -> None:
    """Reads the routes file, so that a mistake in it is told at once and not after minutes.

    Args:
        settings: Of the engine; the plugin is active for it.
        engine_args: vLLM's `EngineArgs`.
        usage_context: What the engine is for.

    Raises:
        RoutesFileError: The file cannot be used.
    """
    if settings.routes is None:
        return
    if usage_context is UsageContext.LLM_CLASS:
        logger.warning(
            "The routes in %s have no effect in LLM(...): they lead requests of HTTP servers. Name "
            "the adapter with LoRARequest.",
            settings.routes,
        )
        return
    served = engine_args.served_model_name or engine_args.model
    load_routes(settings.routes).check_names(
        [served] if isinstance(served, str) else served, "the base model"
    )
