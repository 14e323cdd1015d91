"""What a new engine's configuration needs for LoRA serving: checked, and completed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.usage.usage_lib import UsageContext

from vllm_multilora import __version__
from vllm_multilora.adapters.directory import require_directories
from vllm_multilora.adapters.signing.required import RequiredDigests
from vllm_multilora.adapters.signing.signers import Signers
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.cpu_compilation import choose_compilation
from vllm_multilora.integration.patching.activation import kernel_backend, settings_of
from vllm_multilora.integration.patching.parts import CORE
from vllm_multilora.integration.patching.tables.core_seams import CORE_SEAMS
from vllm_multilora.integration.patching.version import installed_version
from vllm_multilora.integration.recording import make_folder
from vllm_multilora.integration.settings.cache_settings import (
    check_cache_settings,
    lift_default_count,
)
from vllm_multilora.integration.settings.flags import checks_in
from vllm_multilora.integration.updating import allow_updating
from vllm_multilora.sources.source_settings import require_sources
from vllm_multilora.store.protocol.store_folder import store_folder

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

logger = logging.getLogger(__name__)

_ESSENTIAL = ("worker-manager", "batch-mapping", "executor-class", "engine-core")
"""Patches that act together: with one of them missing, requests get the base model's answers."""

COMPILED_WITH = "multilora_compiled_with"
"""Key in `additional_config` that tells whose compiled code a configuration may use."""


def complete(vllm_config: VllmConfig, engine_args: Any, usage_context: UsageContext | None) -> None:
    """Checks a new engine's configuration, and completes it where the plugin loads its adapters.

    Raises:
        ConfigError: A setting cannot be used, or adapters cannot be served with this vLLM.
    """
    settings = settings_of(vllm_config)
    backend = kernel_backend(vllm_config)
    if backend == "vllm":
        if vllm_config.lora_config is not None:
            require_nothing_to_check(settings)
        return
    # What torch.compile has made of stock's layers, or of another version's, is not for us: this is
    # part of the configuration's hash, by which vLLM finds compiled code again.
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config[COMPILED_WITH] = f"{__version__} {backend}"
    require_patches()
    check_cache_settings(settings, vllm_config)
    require_directories(settings.directories)
    warn_of_roots(require_sources(settings))
    if (required := settings.require_digest) is not None:
        RequiredDigests(required)  # a mistake in it stops the start
    if (keys := settings.signing_keys) is not None:
        Signers.read(keys)  # likewise
    require_adapters_apart(vllm_config.kv_transfer_config)
    require_rows_in_order(vllm_config)
    lift_default_count(engine_args, vllm_config)
    choose_compilation(vllm_config, engine_args)
    allow_updating(vllm_config)
    # Whoever starts no engine with it, and only looks, names no use of a configuration.
    if usage_context is not None:
        if settings.store == "process":
            store_folder()  # a mistake in MULTILORA_STORE_FOLDER stops the start, too
        if not engine_args.disable_log_stats or settings.status_port is not None:
            make_folder(vllm_config)
    warn_of_rust(usage_context)


def require_patches() -> None:
    """Refuses to act in a vLLM where requests would be answered by other weights than they name.

    Raises:
        ConfigError: This vLLM is not tested, and lacks what a patch needs that others rely on.
    """
    if CORE.is_tested(installed_version()):
        return
    if lacking := CORE_SEAMS.missing(_ESSENTIAL):
        raise ConfigError(
            f"--multilora cannot force the plugin on with vLLM {installed_version()}, which lacks "
            f"what the patches {', '.join(lacking)} need: leave it out to use vLLM's own LoRA, or "
            f"install vLLM {CORE.tested}"
        )


def require_nothing_to_check(settings: MultiLoRAConfig) -> None:
    """Refuses, where vLLM's own code loads adapters, settings that say which it may load."""
    if checks := checks_in(settings):
        raise ConfigError(
            f"{checks} would check no adapter here, because vLLM's own code loads "
            f"them: vllm-multilora is not active, or has been told to leave them to vLLM. Leave "
            f"out --no-multilora, --multilora-backend vllm and --enable-tower-connector-lora, and "
            f"use vLLM {CORE.tested} on a platform that vllm-multilora has kernels for; or leave "
            f"these flags out"
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


def require_rows_in_order(vllm_config: VllmConfig) -> None:
    """Refuses options with which adapters would meet others' rows.

    An adapter's rows follow from their places among a step's tokens. Some options move rows without
    saying so: one customer's request is then computed with another's adapter, in stock vLLM too.
    """
    for option, flag, reason in _disorder(vllm_config):
        raise ConfigError(
            f"{option} does not go together with {flag}: {reason}, so that one request would be "
            f"computed with another's adapter. Leave one of the two out"
        )


def _disorder(vllm_config: VllmConfig) -> Iterator[tuple[str, str, str]]:
    """An option, what it does not go together with, and why."""
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        reason = "the last layers compute the last token of each prompt only"
        yield "--kv-sharing-fast-prefill", "--enable-lora", reason
    parallel = vllm_config.parallel_config
    if parallel.use_ubatching:
        option = "--enable-dbo" if parallel.enable_dbo else "--ubatch-size"
        yield option, "--enable-lora", "the model computes a step's rows in several parts"


_BY_TOKENS = frozenset(
    {
        "ExampleConnector",
        "HF3FSKVConnector",
        "LMCacheConnectorV1",
        "LMCacheMPConnector",
    }
)
_BY_HASHES = frozenset(
    {"MooncakeStoreConnector", "OffloadingConnector", "SimpleCPUOffloadConnector"}
)
_BY_REQUEST = frozenset(
    {
        "DecodeBenchConnector",
        "ExampleHiddenStatesConnector",
        "HiSparseConnector",
        "MooncakeConnector",
        "MoRIIOConnector",
        "NixlConnector",
        "NixlPullConnector",
        "NixlPushConnector",
    }
)


def require_adapters_apart(transfer: KVTransferConfig | None) -> None:
    """Refuses connectors that would mix adapters, and warns of those that nobody knows.

    Those that look up blocks by vLLM's hashes do not mix them, since the hashes contain the digest
    of the weights, nor do those that pass a request's blocks from one engine to another. Others
    find by tokens alone what another adapter has computed, in stock vLLM too.

    Raises:
        ConfigError: A connector finds blocks by tokens alone.
    """
    if transfer is None or transfer.kv_connector is None:
        return
    of_all = {
        "kv_connector": transfer.kv_connector,
        "kv_connector_module_path": transfer.kv_connector_module_path,
        "kv_connector_extra_config": transfer.kv_connector_extra_config,
    }
    for name, is_vllms in _connectors(of_all):
        if is_vllms and name in _BY_TOKENS:
            raise ConfigError(
                f"the KV connector {name} looks up blocks by their tokens alone, so one adapter "
                "would be answered with what another has computed: serve without --enable-lora, or "
                "use a connector that looks up vLLM's block hashes, such as OffloadingConnector"
            )
        if not is_vllms or name not in _BY_HASHES | _BY_REQUEST:
            logger.warning(
                "vllm-multilora does not know the KV connector %s: unless it looks up blocks by "
                "vLLM's block hashes (Request.block_hashes), one adapter is answered with what "
                "another has computed.",
                name,
            )


def _connectors(settings: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Names of connectors, those in others included, and whether they are vLLM's own."""
    name, is_vllms = settings.get("kv_connector", ""), not settings.get("kv_connector_module_path")
    if not (is_vllms and name == "MultiConnector"):
        yield name, is_vllms
        return
    for one in (settings.get("kv_connector_extra_config") or {}).get("connectors", []):
        yield from _connectors(one)
