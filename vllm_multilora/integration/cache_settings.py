"""The cache's settings, checked against the engine's, and the host memory each worker may fill."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_multilora.cache import CpuBudget, policy_factory
from vllm_multilora.cache.budget import GIB
from vllm_multilora.config import CONFIG_KEY, MultiLoRAConfig
from vllm_multilora.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DEFAULT_SHARE = 0.1
"""Of the machine's memory, for the adapters of one engine, where no limit is given."""

# Of control groups, versions 2 and 1.
_CONTAINER_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)

UNLIMITED = sys.maxsize
"""`max_cpu_loras` of a server where it was not given: only bytes count then."""


def check_cache_settings(settings: MultiLoRAConfig, vllm_config: VllmConfig) -> None:
    """Checks, at start-up, what can be checked before the model is loaded.

    Raises:
        ConfigError: More adapters are pinned than slots allow.
        PolicyError: There is no such policy.
    """
    assert vllm_config.lora_config is not None
    slots = vllm_config.lora_config.max_loras
    if len(settings.pin) >= slots:
        raise ConfigError(
            f"{CONFIG_KEY}.pin names {len(settings.pin)} adapters and there are {slots} slots, one "
            "of which must be left for all others: raise --max-loras or pin fewer adapters"
        )
    policy_factory(settings.cache_policy)


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
    """The budget of one worker.

    A batch may need `max_loras` adapters of the largest rank at the same time, and each keeps a
    host copy, so a budget always holds that many: the default grows to it, a setting that is
    smaller is refused.

    Args:
        settings: The plugin's.
        vllm_config: Of the engine; `lift_default_count` has seen it.
        largest_adapter: Bytes of an adapter of `max_lora_rank` in every module, on this worker.

    Raises:
        ConfigError: `cpu_cache_gib` is too small for the slots.
    """
    lora_config, parallel = vllm_config.lora_config, vllm_config.parallel_config
    assert lora_config is not None
    count = None if lora_config.max_cpu_loras == UNLIMITED else lora_config.max_cpu_loras
    least = lora_config.max_loras * largest_adapter
    # The engine's workers on this machine: they share what is given for the machine.
    workers = parallel.local_world_size * max(1, parallel.data_parallel_size_local)
    if settings.cpu_cache_gib is not None:
        share = int(settings.cpu_cache_gib * GIB) // workers
        if share < least:
            needed = least * workers / GIB
            raise ConfigError(
                f"{CONFIG_KEY}.cpu_cache_gib is {settings.cpu_cache_gib:g}, but the adapters of "
                f"one batch may take {needed:.2f} GiB ({lora_config.max_loras} slots, rank "
                f"{lora_config.max_lora_rank}, {workers} workers on this machine): raise "
                "--multilora-cpu-cache-gib, or lower --max-loras or --max-lora-rank"
            )
        return CpuBudget(adapters=count, bytes=share)
    if count is not None:
        return CpuBudget(adapters=count)
    share = int(machine_memory() * DEFAULT_SHARE) // workers
    return CpuBudget(bytes=max(share, least))


def machine_memory() -> int:
    """Bytes of memory that this machine has, or this container may use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in map(Path, _CONTAINER_LIMITS):
        try:
            memory = min(memory, int(limit.read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return memory
