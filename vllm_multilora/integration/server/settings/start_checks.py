"""What the gateway needs of a new engine's configuration, checked before the engine starts."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from argparse import Namespace
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.exceptions import GracefulHTTPError
from vllm.usage.usage_lib import UsageContext

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.documents import DocumentError, read_file
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.api_server.failure_delivery import ANSWER_CHECKS
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.seals import SECRET_VARIABLE
from vllm_multilora.integration.server.settings.gateway_activation import (
    GATEWAY,
    idle_flags,
    manages_adapters,
)
from vllm_multilora.metering.usage_log import require_writable
from vllm_multilora.routing.routes_file import load_routes
from vllm_multilora.tenants.keys import (
    ADMIN_KEY_VARIABLE,
    MAX_KEY_LENGTH,
    can_be_sent,
    is_stored,
    key_in,
)
from vllm_multilora.tenants.rules import Locks
from vllm_multilora.tenants.tenants_file import load_tenants

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

COUNT_VARIABLE = "MULTILORA_API_SERVERS"
"""Tells the API servers of one `vllm serve` how many they are."""

MIN_ADMIN_KEY = 16

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
    """Checks the gateway's settings, where it is active for an engine.

    Args:
        vllm_config: Of the engine.
        engine_args: vLLM's `EngineArgs` that it was made from.
        usage_context: What the engine is for.
        is_headless: Whether API servers of other machines are its only clients.

    Raises:
        ConfigError: A file that a setting names cannot be used.
    """
    settings = settings_of(vllm_config)
    if usage_context is UsageContext.OPENAI_BATCH_RUNNER and (idle := idle_flags(vllm_config)):
        logger.warning("No effect in vllm run-batch, which has no HTTP server: %s.", idle)
    is_server = usage_context not in (None, UsageContext.LLM_CLASS) and not is_headless
    if is_server and settings.usage_log is not None and manages_adapters(vllm_config):
        require_writable(Path(settings.usage_log))
    if settings.routes is None:
        return
    if usage_context is UsageContext.LLM_CLASS:
        logger.warning(
            "The routes in %s have no effect in LLM(...): they lead requests of HTTP servers. Name "
            "the adapter with LoRARequest.",
            settings.routes,
        )
        return
    # A mistake in the file is told at once and not after minutes.
    served = engine_args.served_model_name or engine_args.model
    names = [served] if isinstance(served, str) else served
    load_routes(settings.routes).check_names(names, "the base model")


def read_keys(vllm_config: VllmConfig, *, is_headless: bool = False) -> None:
    """Reads the admin key and the tenants file, and hands API servers and engine what they share.

    Raises:
        ConfigError: The admin key or the tenants file cannot be used, the engine would not know the
            secret of the seals, or a port without keys would show what they guard.
    """
    settings = settings_of(vllm_config)
    if require_gateway not in ANSWER_CHECKS:
        ANSWER_CHECKS.append(require_gateway)
    read_admin_keys(settings, os.environ)
    host = (settings.status_port or "").rpartition(":")[0]
    if host not in ("", "127.0.0.1", "localhost"):
        raise ConfigError(
            f"--multilora-status-port {settings.status_port} would show whoever reaches {host} the "
            "adapters of all tenants, and this server has keys: leave the address out, so that it "
            "is the loopback address, or ask the server itself with a key"
        )
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
    """Lets nobody be answered where the application lacks the gateway, which enforces the keys.

    With several API servers vLLM reads each one's arguments before it loads its plugins, so nothing
    of ours has seen them there. vLLM imports each middleware when it makes its application.
    """
    if GATEWAY.rpartition(".")[0] not in sys.modules:
        raise GracefulHTTPError(
            f"This server has keys, and its application lacks what enforces them, the middleware "
            f"{GATEWAY}: start it with `vllm serve`",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )


def read_admin_keys(settings: MultiLoRAConfig, environment: Mapping[str, str]) -> list[str]:
    """The operators' keys: those in their file, or the variable's value.

    Raises:
        ConfigError: The file cannot be read or holds no key, or one is short, a hash or cannot be
            sent.
    """
    if settings.admin_key_file is not None:
        return read_file(settings.admin_key_file, parse_admin_keys, "admin keys")
    found = key_in(environment)
    return parse_admin_keys(ADMIN_KEY_VARIABLE, found) if found else []


def parse_admin_keys(where: str, text: str) -> list[str]:
    """Operators' keys: every line that is not empty; messages name the file and never show a key.

    Raises:
        DocumentError: There is no key, or one is short, a hash or cannot be sent.
    """
    lines = map(str.strip, text.removeprefix("\ufeff").splitlines())
    keys, fault = [line for line in lines if line], ""
    if not keys:
        fault = "no admin key, expected one per line"
    elif any(len(key) < MIN_ADMIN_KEY for key in keys):
        fault = (
            f"an admin key of fewer than {MIN_ADMIN_KEY} characters, expected a random one "
            f"(vllm-multilora tenants new makes one)"
        )
    elif any(map(is_stored, keys)):
        fault = (
            "a key's hash, expected keys alone, as in the first line of what vllm-multilora "
            "tenants new prints"
        )
    elif not all(map(can_be_sent, keys)):
        fault = (
            f"an admin key that HTTP cannot carry, expected up to {MAX_KEY_LENGTH} printable "
            f"ASCII characters"
        )
    if fault:
        raise DocumentError(f"{where}: found {fault}")
    return keys


def api_keys_in(args: Namespace) -> list[str]:
    """The API keys of vLLM itself, in a server's arguments or environment."""
    return [key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]) if key]


def warn_of_open_updates(locks: Locks) -> None:
    """Logs who can load and unload adapters where there is no admin key."""
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING and not locks.admin_key:
        who = "Everybody with the API key" if locks.api_key else "Everybody"
        if locks.tenants and not locks.api_key:
            who = "Nobody"
        flags = "--multilora-admin-key-file or MULTILORA_ADMIN_KEY"
        text = "%s can load and unload adapters: there is no admin key (%s)."
        logger.warning(text, who, flags)
