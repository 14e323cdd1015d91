"""A new engine's configuration: each part of the plugin checks its settings before the start.

This module puts the two parts together. It imports the gateway's checks only where the gateway
acts, so that a vLLM that the gateway does not fit still has LoRA served.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.usage.usage_lib import UsageContext

from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.api_server import engine_settings
from vllm_multilora.integration.patching.activation import announce, settings_of
from vllm_multilora.integration.server.settings import gateway_activation as gateway
from vllm_multilora.integration.settings.start_errors import in_one_sentence
from vllm_multilora.tenants.keys import UNGUARDED, has_keys, key_in

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


@in_one_sentence
def create_engine_config(
    original: Callable[..., VllmConfig], engine_args: Any, *args: Any, **kwargs: Any
) -> VllmConfig:
    vllm_config = original(engine_args, *args, **kwargs)
    usage_context = args[0] if args else kwargs.get("usage_context")
    announce(vllm_config)
    engine_settings.complete(vllm_config, engine_args, usage_context)
    gateway.announce(vllm_config)
    is_headless = args[1] if len(args) > 1 else kwargs.get("headless", False)
    if gateway.is_active(vllm_config):
        from vllm_multilora.integration.server.requests import metrics_route
        from vllm_multilora.integration.server.settings import start_checks

        start_checks.check(vllm_config, engine_args, usage_context, is_headless=is_headless)
        if usage_context is not None:  # else nobody starts an engine with it
            metrics_route.show(vllm_config)
    check_access(vllm_config, usage_context, is_headless=is_headless)
    return vllm_config


def check_access(
    vllm_config: VllmConfig, usage_context: UsageContext | None = None, *, is_headless: bool = False
) -> None:
    """Has the gateway read the keys of a server that has any.

    Raises:
        ConfigError: The keys cannot be used, or nothing would guard the server with them.
    """
    # All servers of a machine may have the variable, also those without adapters.
    is_server = usage_context is UsageContext.OPENAI_API_SERVER
    is_in_environment = vllm_config.lora_config is not None and is_server and key_in(os.environ)
    if not has_keys(settings_of(vllm_config)) and not is_in_environment:
        return
    if usage_context in (UsageContext.LLM_CLASS, UsageContext.OPENAI_BATCH_RUNNER):
        logger.warning(
            "Keys and tenants have no effect in LLM(...) and in vllm run-batch: they protect HTTP "
            "servers."
        )
        return
    if not gateway.is_active(vllm_config) or envs.VLLM_USE_RUST_FRONTEND:
        raise ConfigError(UNGUARDED)
    from vllm_multilora.integration.server.settings import start_checks

    start_checks.read_keys(vllm_config, is_headless=is_headless)
