"""Private attributes of vLLM's that the plugin reads or calls, besides what it replaces.

`vllm-multilora doctor --against` looks for them, and a part of the plugin is inactive on a newer
vLLM that lacks one. `tests/unit/patching/test_private_attributes.py` holds the tables against the
code. They may only get shorter.
"""

from __future__ import annotations

CORE_ATTRIBUTES: tuple[str, ...] = (
    "vllm.config.parallel:ParallelConfig._api_process_count",
    "vllm.config.parallel:ParallelConfig._api_process_rank",
    "vllm.lora.model_manager:LoRAModelManager._convert_3d_to_2d_moe_lora",
    "vllm.lora.model_manager:LoRAModelManager._create_merged_loras_inplace",
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner._replace_quant_method",
    "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead",
    "vllm.v1.structured_output.request:StructuredOutputRequest._grammar",
)
"""What LoRA serving reads."""

GATEWAY_ATTRIBUTES: tuple[str, ...] = (
    "vllm.v1.engine.core_client:AsyncMPClient._call_utility_async",
)
"""What the gateway reads."""

TOOL_ATTRIBUTES: tuple[str, ...] = ("vllm.model_executor.layers.rotary_embedding:_ROPE_DICT",)
"""What the commands read that set a model up without weights."""
