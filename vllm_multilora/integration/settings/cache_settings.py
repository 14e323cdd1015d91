"""Checks the cache's settings against the engine's, and derives what the store keeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.memory_folders import users_folder
from vllm_multilora.slots.budget import GIB, CpuBudget, enough_gib, machine_memory
from vllm_multilora.slots.pins import Pins
from vllm_multilora.slots.policies.policy_registry import make_policy
from vllm_multilora.sources.source_settings import disk_cache, roots_of_store
from vllm_multilora.store.protocol.messages import StoreSettings
from vllm_multilora.wording import counted

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DEFAULT_SHARE = 0.1
"""Share of the machine's memory that caches adapters where no limit is given."""

UNLIMITED = sys.maxsize
"""`max_cpu_loras` of a server where it was not given: only bytes count then."""


def check_cache_settings(settings: MultiLoRAConfig, vllm_config: VllmConfig) -> None:
    """Checks, at start-up, what can be checked before the model is loaded.

    Raises:
        ConfigError: More adapters are pinned than slots allow.
        PolicyError: There is no such policy.
    """
    assert vllm_config.lora_config is not None
    Pins(vllm_config.lora_config.max_loras, settings.pin)
    make_policy(settings.cache_policy)


def lift_default_count(engine_args: Any, vllm_config: VllmConfig) -> None:
    """Undoes vLLM's default of as many adapters in host memory as there are slots.

    vLLM fills in the default before anybody can see that nothing was given; that would leave a
    tier with nothing in it but the slots' own copies.
    """
    lora_config = vllm_config.lora_config
    if lora_config is not None and engine_args.max_cpu_loras is None:
        lora_config.max_cpu_loras = UNLIMITED


def cpu_budget(
    settings: MultiLoRAConfig, vllm_config: VllmConfig, *, largest_adapter: int
) -> CpuBudget:
    """How much host memory adapters may take on this machine.

    The store keeps one copy of an adapter for all engines of the machine, and the largest budget
    that any of them asks for. It must hold the adapters of one batch at least, so that none waits
    for memory that another one of the same batch has: the default grows to that, a setting that
    is smaller is refused.

    Raises:
        ConfigError: `cpu_cache_gib` is too small for the slots.
    """
    lora_config = vllm_config.lora_config
    assert lora_config is not None
    count = None if lora_config.max_cpu_loras == UNLIMITED else lora_config.max_cpu_loras
    least = lora_config.max_loras * largest_adapter
    if settings.cpu_cache_gib is not None:
        given = int(settings.cpu_cache_gib * GIB)
        if given < least:
            raise ConfigError(
                f"--multilora-cpu-cache-gib is {settings.cpu_cache_gib:g}, but the adapters of "
                f"one batch may take {enough_gib(least)} GiB "
                f"({counted(lora_config.max_loras, 'slot')}, rank {lora_config.max_lora_rank}): "
                "raise it, or lower --max-loras or --max-lora-rank"
            )
        return CpuBudget(adapters=count, bytes=given)
    if count is not None:
        return CpuBudget(adapters=count)
    return CpuBudget(bytes=max(int(machine_memory() * DEFAULT_SHARE), least))


def store_settings(settings: MultiLoRAConfig, budget: CpuBudget) -> StoreSettings:
    """What an engine asks of the store."""
    keys, credentials = settings.signing_keys, settings.source_credentials
    # Those that workers are given as tensors are the operator's, too.
    pushed = [str(users_folder())] if settings.allowed_roots else []
    return StoreSettings(
        budget_bytes=budget.bytes,
        budget_adapters=budget.adapters,
        policy=settings.cache_policy,
        jobs=settings.loader_threads,
        timeout_s=settings.load_timeout_s,
        # Absolute: the store may be another server's, which was started elsewhere.
        allowed_roots=(*roots_of_store(settings), *pushed),
        directories=tuple(map(os.path.abspath, settings.directories)),
        allow_pickle=settings.allow_pickle,
        allow_hub=settings.allow_hub,
        check_finite=settings.check_finite,
        signing_keys=keys and str(Path(keys).absolute()),
        disk_cache=disk_cache(settings),
        disk_cache_bytes=int(settings.disk_cache_gib * GIB),
        source_credentials=credentials and str(Path(credentials).absolute()),
    )
