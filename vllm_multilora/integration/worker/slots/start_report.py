"""Logs once, when a server starts, how much memory its adapters take."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from multilora_kernels.dtypes import of_torch
from vllm_multilora.slots.budget import CpuBudget, machine_memory, readable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager

logger = logging.getLogger(__name__)


def report_slots(
    manager: MultiLoRAModelManager, budget: CpuBudget, vllm_config: VllmConfig
) -> None:
    """Logs the memory of slots and host copies, from what has really been allocated.

    Args:
        manager: Of this worker's part of the model; the first worker speaks for all.
        budget: Of this worker's host memory.
        vllm_config: The engine's.
    """
    parallel, lora_config = vllm_config.parallel_config, manager.lora_config
    if parallel.rank != 0 or parallel.data_parallel_rank != 0:
        return
    dtype: Any = lora_config.lora_dtype
    taken, slots = manager.allocated_bytes, manager.lora_slots
    if manager.device.type == "cpu":
        of_what, memory = "the machine's %s", machine_memory()
    else:
        of_what, memory = (
            "a GPU's %s, which the KV cache lacks",
            current_platform.get_device_total_memory(),
        )
    workers = parallel.world_size_across_dp
    logger.info(
        "Adapter slots: %d of rank %d in %s take %s, %s each: %.1f %% of %s. Adapters in host "
        "memory: up to %s.%s `vllm-multilora plan` shows what other settings would take.",
        slots,
        lora_config.max_lora_rank,
        of_torch(dtype),
        readable(taken),
        readable(taken // slots),
        100 * taken / memory,
        of_what % readable(memory),
        budget,
        f" Each of the {workers} workers takes as much." if workers > 1 else "",
    )
