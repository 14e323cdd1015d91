"""What the gateway needs of a new engine's configuration, checked before the engine starts."""

from __future__ import annotations

import logging
import os
import secrets
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GracefulHTTPError
from vllm.usage.usage_lib import UsageContext

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.api_server.failure_delivery import ANSWER_CHECKS
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.seals import SECRET_VARIABLE
from vllm_multilora.integration.server.settings.gateway_activation import (
    GATEWAY,
    is_gateway_missing,
    manages_adapters,
)
from vllm_multilora.integration.server.settings.key_settings import COUNT_VARIABLE, read_admin_keys
from vllm_multilora.metering.usage_log import require_writable
from vllm_multilora.routing import load_routes
from vllm_multilora.tenants.tenants_file import load_tenants

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_UNSHARED = (
    "--multilora-tenants: engines on several machines need a secret that their API servers share. "
    "Put the same `cache_salt` in the tenants file of each, and let vLLM start the engines "
    "(--data-parallel-backend mp)"
)


def check(
    vllm_config: VllmConfig,
    engine_args: Any,
    usage_context: UsageContext | None,
    *,
    is_headless: bool,
) -> None:
    """Checks the gateway's settings.

    Args:
        vllm_config: Of the engine; the gateway is active for it.
        engine_args: vLLM's `EngineArgs` that it was made from.
        usage_context: What the engine is for.
        is_headless: Whether API servers of other machines are its only clients.

    Raises:
        ConfigError: A file that a setting names cannot be used.
    """
    settings = settings_of(vllm_config)
    if usage_context is UsageContext.OPENAI_BATCH_RUNNER and (idle := _without_http(settings)):
        logger.warning("No effect in vllm run-batch, which has no HTTP server: %s.", idle)
    is_server = usage_context not in (None, UsageContext.LLM_CLASS) and not is_headless
    if is_server and settings.usage_log is not None and manages_adapters(vllm_config):
        require_writable(Path(settings.usage_log))
    check_routes(settings, engine_args, usage_context)


def _without_http(settings: MultiLoRAConfig) -> str:
    """The flags that are given and that only an HTTP server has a use for."""
    given = {
        "--multilora-adapter-dir": settings.adapter_dir,
        "--multilora-routes": settings.routes,
        "--multilora-usage-log": settings.usage_log,
    }
    return ", ".join(flag for flag, value in given.items() if value)


def read_keys(vllm_config: VllmConfig, *, is_headless: bool = False) -> None:
    """Reads the admin key and the tenants file, and hands API servers and engine what they share.

    Raises:
        ConfigError: The admin key or the tenants file cannot be used, or the engine would not know
            the secret of the seals.
    """
    settings = settings_of(vllm_config)
    if require_gateway not in ANSWER_CHECKS:
        ANSWER_CHECKS.append(require_gateway)
    read_admin_keys(settings, os.environ)
    if settings.tenants is not None:
        own = load_tenants(settings.tenants).cache_salt
        parallel = vllm_config.parallel_config
        is_rays = parallel.data_parallel_backend == "ray"
        if is_rays or (is_headless and own is None):
            raise ConfigError(_UNSHARED)
        if parallel._api_process_rank < 0 or parallel._api_process_count <= 1:
            os.environ[SECRET_VARIABLE] = own or secrets.token_hex(32)
            os.environ[COUNT_VARIABLE] = str(max(1, parallel._api_process_count))


def require_gateway() -> None:
    """Lets nobody be answered where nothing enforces the server's keys.

    Raises:
        GracefulHTTPError: This process's application was made without the gateway.
    """
    if is_gateway_missing():
        raise GracefulHTTPError(
            f"This server has keys, and its application lacks what enforces them, the middleware "
            f"{GATEWAY}: start it with `vllm serve`",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )


def check_routes(
    settings: MultiLoRAConfig, engine_args: Any, usage_context: UsageContext | None
) -> None:
    """Reads the routes file, so that a mistake in it is told at once and not after minutes.

    Args:
        settings: Of the engine; the gateway is active for it.
        engine_args: vLLM's `EngineArgs`.
        usage_context: What the engine is for.

    Raises:
        DocumentError: The file cannot be used.
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
