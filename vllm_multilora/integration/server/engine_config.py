"""Checks and completes the configuration of a new engine before the engine is started."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.usage.usage_lib import UsageContext

from vllm_multilora import __version__
from vllm_multilora.adapters.directory import require_directories
from vllm_multilora.adapters.required import RequiredDigests
from vllm_multilora.adapters.signers import Signers
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.patching.activation import (
    announce,
    is_active,
    kernel_backend,
    settings_of,
)
from vllm_multilora.integration.patching.cache_settings import (
    check_cache_settings,
    lift_default_count,
)
from vllm_multilora.integration.patching.flags import UNGUARDED, checks_in, has_keys
from vllm_multilora.integration.patching.ledger import missing
from vllm_multilora.integration.patching.version import (
    SUPPORTED_TEXT,
    installed_version,
    is_supported,
)
from vllm_multilora.integration.server.key_settings import (
    COUNT_VARIABLE,
    SALT_VARIABLE,
    key_in,
    read_admin_keys,
)
from vllm_multilora.integration.server.kv_connectors import require_adapters_apart
from vllm_multilora.integration.server.metrics import make_folder
from vllm_multilora.integration.server.row_order import require_rows_in_order
from vllm_multilora.integration.updating import allow_updating
from vllm_multilora.metering.usage_log import require_writable
from vllm_multilora.routing import load_routes
from vllm_multilora.store.folder import store_folder
from vllm_multilora.tenants.parsing import load_tenants

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_ESSENTIAL = (
    *("punica-wrapper", "worker-manager", "batch-mapping", "batch-inputs", "scheduler-class"),
    *("executor", "add-request", "server-start"),
)
"""Patches that act together: with one of them missing, requests get the base model's answers."""

COMPILED_WITH = "multilora_compiled_with"
"""Key in `additional_config` that tells whose compiled code a configuration may use."""


def create_engine_config(
    original: Callable[..., VllmConfig], engine_args: Any, *args: Any, **kwargs: Any
) -> VllmConfig:
    vllm_config = original(engine_args, *args, **kwargs)
    usage_context = args[0] if args else kwargs.get("usage_context")
    announce(vllm_config)
    settings = settings_of(vllm_config)
    backend = kernel_backend(vllm_config)
    if backend != "vllm":
        # What torch.compile has made of stock's layers, or of another version's, is not for us:
        # this is part of the configuration's hash, by which vLLM finds compiled code again.
        if isinstance(vllm_config.additional_config, dict):
            vllm_config.additional_config[COMPILED_WITH] = f"{__version__} {backend}"
        require_patches()
        check_cache_settings(settings, vllm_config)
        require_directories(settings.adapter_dir)
        warn_of_roots(settings.allowed_roots)
        if (required := settings.require_digest) is not None:
            RequiredDigests(required)  # a mistake in it is told at once
        if (keys := settings.signing_keys) is not None:
            Signers.read(keys)  # likewise
        is_headless = args[1] if len(args) > 1 else kwargs.get("headless", False)
        is_server = usage_context not in (None, UsageContext.LLM_CLASS) and not is_headless
        if is_server and (log := settings.usage_log) is not None:
            require_writable(Path(log))
        require_adapters_apart(vllm_config.kv_transfer_config)
        require_rows_in_order(vllm_config)
        lift_default_count(engine_args, vllm_config)
        allow_updating(vllm_config)
        # Whoever starts no engine with it, and only looks, names no use of a configuration.
        if usage_context is not None:
            if settings.store == "process":
                store_folder()  # a mistake in MULTILORA_STORE_FOLDER is told at once, too
            if not engine_args.disable_log_stats:
                make_folder(vllm_config)
        warn_of_rust(usage_context)
    elif vllm_config.lora_config is not None:
        require_nothing_to_check(settings)
    if is_active(vllm_config):
        check_routes(settings, engine_args, usage_context)
    check_access(vllm_config, usage_context)
    return vllm_config


def require_patches() -> None:
    """Refuses to act in a vLLM where requests would be answered by other weights than they name.

    Raises:
        ConfigError: This vLLM is not supported, and lacks what a patch needs that others rely on.
    """
    if not is_supported(installed_version()) and (lacking := missing(_ESSENTIAL)):
        raise ConfigError(
            f"--multilora cannot force the plugin on with vLLM {installed_version()}, which lacks "
            f"what the patches {', '.join(lacking)} need: leave it out to use vLLM's own LoRA, or "
            f"install vLLM {SUPPORTED_TEXT}"
        )


def require_nothing_to_check(settings: MultiLoRAConfig) -> None:
    """Refuses, where vLLM's own code loads adapters, settings that say which it may load.

    Raises:
        ConfigError: There are such settings.
    """
    if checks := checks_in(settings):
        raise ConfigError(
            f"{checks} would check no adapter here, because vLLM's own code loads "
            f"them: vllm-multilora is not active, or has been told to leave them to vLLM. Leave "
            f"out --no-multilora, --multilora-backend vllm and --enable-tower-connector-lora, and "
            f"use vLLM {SUPPORTED_TEXT} on a platform that vllm-multilora has kernels for; or "
            f"leave these flags out"
        )


def warn_of_roots(roots: Sequence[str]) -> None:
    """Says which of the allowed roots are no folders, as after a slip of the pen.

    Such a root is no error: it may be mounted later, and is looked at for each adapter.
    """
    for root in roots:
        try:
            Path(root, "..").stat()  # adapters below need it entered, and not listed
        except OSError as error:
            logger.warning(
                "--multilora-allowed-roots names %r, which is not a folder that the server can "
                "enter (%s): adapters below it are refused until it is. Create or mount it, or "
                "correct the flag.",
                root,
                error.strerror,
            )


def warn_of_rust(usage_context: UsageContext | None) -> None:
    """Says what is missing where vLLM's Rust front end serves, which loads no plugins."""
    if usage_context is UsageContext.OPENAI_API_SERVER and envs.VLLM_USE_RUST_FRONTEND:
        logger.warning(
            "vLLM's Rust front end (VLLM_USE_RUST_FRONTEND=1) loads no plugins: adapter "
            "directories, routes, GET /v1/lora_adapters, exact answers to registrations and LoRA "
            "metrics are missing. Unset it to have them."
        )


def check_access(vllm_config: VllmConfig, usage_context: UsageContext | None = None) -> None:
    """Reads the admin key and the tenants file, and hands API servers what they share.

    Raises:
        ConfigError: The admin key or the tenants file cannot be used, or nothing would guard the
            server with them.
    """
    settings = settings_of(vllm_config)
    # All servers of a machine may have the variable, also those without adapters.
    serves_adapters = vllm_config.lora_config is not None
    is_server = usage_context is UsageContext.OPENAI_API_SERVER
    if not has_keys(settings) and not (key_in(os.environ) and serves_adapters and is_server):
        return
    if usage_context in (UsageContext.LLM_CLASS, UsageContext.OPENAI_BATCH_RUNNER):
        logger.warning(
            "Keys and tenants have no effect in LLM(...) and in vllm run-batch: they protect HTTP "
            "servers."
        )
        return
    if not is_active(vllm_config) or envs.VLLM_USE_RUST_FRONTEND:
        raise ConfigError(UNGUARDED)
    read_admin_keys(settings, os.environ)
    if settings.tenants is not None:
        load_tenants(settings.tenants)
        choose_grammars(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel._api_process_rank < 0 or parallel._api_process_count <= 1:
            os.environ[SALT_VARIABLE] = secrets.token_hex(32)
            os.environ[COUNT_VARIABLE] = str(max(1, parallel._api_process_count))


def choose_grammars(vllm_config: VllmConfig) -> None:
    """Has no tenant choose for all others what computes their structured outputs.

    An engine has one thing for that. With vLLM's `auto` it is what the first request of all needs,
    and fails many of those that follow, for as long as the engine lives.
    """
    outputs = vllm_config.structured_outputs_config
    if outputs.backend == "auto":
        outputs.backend = "xgrammar"
        logger.info(
            "With tenants, structured outputs are those of xgrammar: `auto` would let the first "
            "request choose for all (--structured-outputs-config.backend)."
        )


def check_routes(
    settings: MultiLoRAConfig, engine_args: Any, usage_context: UsageContext | None
) -> None:
    """Reads the routes file, so that a mistake in it is told at once and not after minutes.

    Args:
        settings: Of the engine; the plugin is active for it.
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
