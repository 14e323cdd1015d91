"""Whether LoRA serving is active for an engine, and with which backend: one answer for all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from multilora_kernels import resolve_backend
from vllm_multilora import __version__
from vllm_multilora.config import CONFIG_KEY, MultiLoRAConfig, flag_of
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.patching.decision import acts, said_of
from vllm_multilora.integration.patching.tables.core_seams import CORE_SEAMS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_ALWAYS_HEEDED = {"enabled", "backend", "routes", "tenants", "admin_key_file"}
"""Settings that mean something also where vLLM's own code loads and computes the adapters."""


def settings_of(vllm_config: VllmConfig) -> MultiLoRAConfig:
    """The plugin's settings of an engine; see `MultiLoRAConfig.from_additional_config`."""
    return MultiLoRAConfig.from_additional_config(_additional(vllm_config))


def given_to(vllm_config: VllmConfig) -> dict[str, Any]:
    """The settings that were given for an engine; empty where none were."""
    return _additional(vllm_config).get(CONFIG_KEY) or {}


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    # vLLM also allows a platform's own object there; such an engine has no settings of ours.
    additional = vllm_config.additional_config
    return additional if isinstance(additional, dict) else {}


def is_active(vllm_config: VllmConfig) -> bool:
    """Whether the core acts for this engine: it is on, LoRA is on, and not for towers."""
    lora = vllm_config.lora_config
    return lora is not None and not adapts_towers(lora) and is_enabled(settings_of(vllm_config))


def adapts_towers(given: Any) -> bool:
    """Whether adapters act in towers and connectors: such servers are left to vLLM."""
    return bool(getattr(given, "enable_tower_connector_lora", False))


def is_enabled(settings: MultiLoRAConfig) -> bool:
    """Whether the core is on: by its settings or, where these leave it open, by what vLLM is."""
    return acts(CORE_SEAMS) if settings.enabled is None else settings.enabled


def kernel_backend(vllm_config: VllmConfig) -> str:
    """The backend that computes this engine's adapters; `vllm` where the plugin is not active.

    Raises:
        ConfigError: The settings and the platform do not go together.
        NativeUnavailableError: `native` was asked for by name and cannot be built.
        TritonUnavailableError: `triton` was asked for, or is needed, and cannot run here.
    """
    from vllm import envs
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    if not is_active(vllm_config):
        return "vllm"
    # ROCm's devices are CUDA devices to PyTorch, and so to the kernels.
    on_gpu = current_platform.is_cuda_alike()
    graphs = vllm_config.compilation_config.cudagraph_mode
    return choose_backend(
        settings_of(vllm_config),
        "cuda" if on_gpu else current_platform.device_type,
        vllm_batch_invariant=envs.VLLM_BATCH_INVARIANT,
        captures_graphs=on_gpu and graphs not in (None, CUDAGraphMode.NONE),
    )


def loads_adapters(vllm_config: VllmConfig) -> bool:
    """Whether the plugin loads and computes this engine's adapters, and not vLLM's own code."""
    return kernel_backend(vllm_config) != "vllm"


def choose_backend(
    settings: MultiLoRAConfig,
    device_type: str,
    *,
    vllm_batch_invariant: bool = False,
    captures_graphs: bool = False,
) -> str:
    """What the settings mean on a device.

    Args:
        settings: The plugin's settings; it is active.
        device_type: PyTorch's name for the device; `cuda` includes ROCm.
        vllm_batch_invariant: Whether vLLM itself runs in its batch-invariant mode.
        captures_graphs: Whether vLLM captures CUDA graphs.

    Returns:
        `native`, `torch`, `triton` or `triton-invariant`, or `vllm` where there is nothing better
        than vLLM's own.

    Raises:
        ConfigError: The settings do not go together with the device.
        ValueError: The backend is one for another device.
        NativeUnavailableError: As for `kernel_backend`.
        TritonUnavailableError: As for `kernel_backend`.
    """
    backend = settings.backend
    if backend == "vllm":
        return backend
    invariant = settings.batch_invariant or vllm_batch_invariant
    if device_type not in ("cpu", "cuda"):
        if backend == "auto" and not settings.batch_invariant:
            return "vllm"
        raise ConfigError(
            f"vllm-multilora has kernels for CPUs and for NVIDIA and AMD GPUs, and vLLM's platform "
            f"here is {device_type!r}: leave --multilora-backend and --multilora-batch-invariant "
            f"out to use vLLM's own kernels"
        )
    if settings.batch_invariant and device_type == "cuda" and backend == "auto":
        backend = "triton"
    resolved = resolve_backend(backend, device_type)
    if device_type == "cuda" and resolved == "torch":
        if backend == "auto":
            return "vllm"
        if captures_graphs:
            raise ConfigError(
                "the backend 'torch' reads each batch's plan on the host, which CUDA graphs cannot "
                "capture: choose --multilora-backend triton, or add --enforce-eager"
            )
    if settings.kernels == "vllm" and resolved != "triton":
        raise ConfigError(
            f"--multilora-kernels vllm is for GPUs with Triton, and the backend here is "
            f"{resolved!r}: leave it out, or use --multilora-backend vllm to leave LoRA to vLLM"
        )
    if not invariant or resolved == "native":
        return resolved
    if resolved == "triton":
        return "triton-invariant"
    source = "--multilora-batch-invariant" if settings.batch_invariant else "VLLM_BATCH_INVARIANT=1"
    better = "native" if device_type == "cpu" else "triton"
    raise ConfigError(
        f"{source} needs kernels whose sums do not depend on the batch, and the backend here is "
        f"{resolved!r}: choose --multilora-backend {better}"
    )


def announce(vllm_config: VllmConfig) -> None:
    """Checks the settings of a new engine and logs, once, what LoRA serving will do."""
    settings = settings_of(vllm_config)
    given = given_to(vllm_config)
    if vllm_config.lora_config is None:
        if given and settings.enabled is not False:
            logger.warning("These flags have no effect without --enable-lora: %s.", as_flags(given))
        return
    if settings.enabled is None and (said := said_of(CORE_SEAMS)):
        is_on = is_enabled(settings)
        logger.warning("%s.%s", said, "" if is_on else " --multilora forces it on.")
    if settings.enabled is False:
        logger.info("vllm-multilora is switched off (--no-multilora).")
    elif not is_enabled(settings):
        return
    elif adapts_towers(vllm_config.lora_config):
        logger.warning(
            "vllm-multilora %s leaves this server to vLLM's own LoRA, because it serves no "
            "adapters of towers and connectors (--enable-tower-connector-lora).%s",
            __version__,
            f" These flags have no effect: {as_flags(given)}." if given else "",
        )
    elif (backend := kernel_backend(vllm_config)) == "vllm" and settings.backend == "auto":
        logger.info(
            "vllm-multilora %s has no kernels for this platform: vLLM's own compute its adapters.",
            __version__,
        )
    else:
        logger.info("vllm-multilora %s is active; LoRA kernels: %s.", __version__, backend)
    idle = {name: value for name, value in given.items() if name not in _ALWAYS_HEEDED}
    if idle and is_active(vllm_config) and not loads_adapters(vllm_config):
        logger.warning("These flags have no effect with vLLM's own kernels: %s.", as_flags(idle))


def as_flags(given: Mapping[str, Any]) -> str:
    """Settings as the flags that were given for them."""
    return ", ".join(
        flag_of(name).replace("--", "--no-", 1) if value is False else flag_of(name)
        for name, value in given.items()
    )
