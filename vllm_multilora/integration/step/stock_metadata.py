"""A step as vLLM's own LoRA kernels read it, in the memory of our plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from multilora_kernels import BatchPlan, PlanLayout

if TYPE_CHECKING:
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta


def step_metadata(plan: BatchPlan) -> LoRAKernelMeta:
    """Metadata of vLLM's class over a plan's slot runs, which come to the device with the plan.

    vLLM's own sorts and counts on the device and waits for it, or makes five copies from memory
    that is not pinned. This one needs no copy of its own. Its kernels look at all slots.

    Args:
        plan: Its layout has room for slot runs.
    """
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta  # on GPUs only

    buffer, runs = plan.buffer, plan.layout.runs
    every_slot = torch.tensor([runs.max_loras + 1], dtype=torch.int32)
    return LoRAKernelMeta(
        token_lora_mapping=buffer[runs.token_slot],
        token_indices_sorted_by_lora_ids=buffer[runs.by_slot],
        active_lora_ids=buffer[runs.slot],
        num_tokens_per_lora=buffer[runs.length],
        lora_token_start_loc=buffer[runs.start],
        no_lora_flag_cpu=torch.tensor([False]),
        num_active_loras_cpu=every_slot,
        default_num_active_loras_cpu=every_slot,
        captured_lora_counts=[runs.max_loras + 1],
    )


def kernel_arguments(
    plan: torch.Tensor, layout: PlanLayout, tokens: int
) -> tuple[torch.Tensor, ...]:
    """What vLLM's two operators want to know of a step, in their order, up to its flags.

    Args:
        plan: int32 [layout.size], a plan's buffer.
        layout: Its layout, with slot runs.
        tokens: Rows of the activations.
    """
    runs = layout.runs
    return (
        plan[runs.token_slot][:tokens],
        plan[runs.by_slot][:tokens],
        plan[runs.length],
        plan[runs.start],
        plan[runs.slot],
    )
