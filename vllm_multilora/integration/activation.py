"""Whether the plugin acts for an engine, and with which backend: one answer for all patches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from multilora_kernels import resolve_backend
from vllm_multilora import __version__
from vllm_multilora.config import CONFIG_KEY, MultiLoRAConfig
from vllm_multilora.integration.version import SUPPORTED_TEXT, installed_version, is_supported

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


def settings_of(vllm_config: VllmConfig) -> MultiLoRAConfig:
    """The plugin's settings of an engine; see `MultiLoRAConfig.from_additional_config`."""
    return MultiLoRAConfig.from_additional_config(_additional(vllm_config))


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    # vLLM also allows a platform's own object there; such an engine has no settings of ours.
    additional = vllm_config.additional_config
    return additional if isinstance(additional, dict) else {}


def is_active(vllm_config: VllmConfig) -> bool:
    """Whether the plugin acts for this engine: LoRA is on, and so is the plugin."""
    if vllm_config.lora_config is None:
        return False
    enabled = settings_of(vllm_config).enabled
    return is_supported(installed_version()) if enabled is None else enabled


def kernel_backend(vllm_config: VllmConfig) -> str:
    """The backend that computes this engine's adapters: `native`, `torch` or `vllm`.

    `vllm` where the plugin is not active and where it has nothing better than stock for the
    platform yet.

    Raises:
        NativeUnavailableError: `native` was asked for by name and cannot be built.
    """
    from vllm.platforms import current_platform

    if not is_active(vllm_config):
        return "vllm"
    backend = settings_of(vllm_config).backend
    if current_platform.is_cpu():
        return "vllm" if backend == "vllm" else resolve_backend(backend, "cpu")
    if backend in ("auto", "vllm"):
        return "vllm"
    raise ValueError(
        f"--multilora-backend {backend} runs on CPUs only, and vLLM's platform here is "
        f"{current_platform.device_type}; leave the flag out to use vLLM's own kernels"
    )


def announce(vllm_config: VllmConfig) -> None:
    """Checks the settings of a new engine and logs, once, what the plugin will do."""
    settings = settings_of(vllm_config)
    given = _additional(vllm_config).get(CONFIG_KEY)
    if vllm_config.lora_config is None:
        if given:
            logger.warning(
                "The --multilora settings %s have no effect without --enable-lora.", given
            )
        return
    installed = installed_version()
    if settings.enabled is None and not is_supported(installed):
        logger.warning(
            "vllm-multilora %s supports vLLM %s and found %s: it stays inactive and vLLM runs as "
            "it is. --multilora forces it on.",
            __version__,
            SUPPORTED_TEXT,
            installed or "no version",
        )
    elif not is_active(vllm_config):
        logger.info("vllm-multilora is switched off (--no-multilora).")
    else:
        logger.info(
            "vllm-multilora %s is active; LoRA kernels: %s.",
            __version__,
            kernel_backend(vllm_config),
        )
