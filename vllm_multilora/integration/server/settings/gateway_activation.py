"""Whether the gateway acts for an engine: for its HTTP, names, keys and tenants."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.integration.patching.activation import (
    adapts_towers,
    as_flags,
    given_to,
    loads_adapters,
    settings_of,
)
from vllm_multilora.integration.patching.activation import is_active as is_core_active
from vllm_multilora.integration.patching.decision import acts, said_of
from vllm_multilora.integration.patching.tables.gateway_seams import GATEWAY_SEAMS
from vllm_multilora.integration.patching.version import installed_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_ITS_SETTINGS = frozenset({"adapter_dir", "routes", "usage_log"})
"""Settings that mean nothing without the gateway; keys and tenants stop the start there."""


def is_enabled(settings: MultiLoRAConfig) -> bool:
    """Whether the gateway is on: not switched off, and the installed vLLM has its seams.

    `--multilora` forces LoRA serving alone: what guards keys and tenants is whole, or off.
    """
    return settings.enabled is not False and acts(GATEWAY_SEAMS)


def is_active(vllm_config: VllmConfig) -> bool:
    """Whether the gateway acts for this engine: it is on, LoRA is on, and not for towers."""
    lora = vllm_config.lora_config
    return lora is not None and not adapts_towers(lora) and is_enabled(settings_of(vllm_config))


def announce(vllm_config: VllmConfig) -> None:
    """Logs, once, why the gateway is off for a new engine with LoRA."""
    settings, lora = settings_of(vllm_config), vllm_config.lora_config
    if lora is None or adapts_towers(lora):
        return
    if settings.enabled is False or is_active(vllm_config):
        return
    if is_core_active(vllm_config) or GATEWAY_SEAMS.part.is_newer(installed_version()):
        logger.warning("%s.", said_of(GATEWAY_SEAMS))
    if idle := {k: value for k, value in given_to(vllm_config).items() if k in _ITS_SETTINGS}:
        logger.warning("These flags have no effect without the gateway: %s.", as_flags(idle))


def is_active_behind(client: Any) -> bool:
    """Whether the gateway acts for the engine behind a client of vLLM's.

    A server that only renders prompts has no engine, and its client no configuration of one.
    """
    vllm_config = getattr(client, "vllm_config", None)
    return vllm_config is not None and is_active(vllm_config)


def manages_adapters(vllm_config: VllmConfig) -> bool:
    """Whether the gateway acts for this engine, and the plugin loads its adapters.

    Raises:
        Exception: As `kernel_backend`.
    """
    return is_active(vllm_config) and loads_adapters(vllm_config)


def manages_adapters_behind(client: Any) -> bool:
    """Whether both hold for the engine behind a client of vLLM's; see `is_active_behind`."""
    vllm_config = getattr(client, "vllm_config", None)
    return vllm_config is not None and manages_adapters(vllm_config)
