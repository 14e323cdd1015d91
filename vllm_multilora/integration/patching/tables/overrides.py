"""What our classes expect of the vLLM classes that they extend or call, besides the ledger.

If a new vLLM no longer has a method that is overridden here, no import fails. `vllm-multilora
doctor --against` compares these methods, as it does the ledger's targets.
"""

from __future__ import annotations

OVERRIDES: dict[str, dict[str, str]] = {
    "vllm.v1.core.sched.scheduler:Scheduler": {
        "add_request": "self, request",
        "schedule": "self, throttle_prefills=False",
        "update_from_output": "self, scheduler_output, model_runner_output",
        "finish_requests": "self, request_ids, finished_status",
        "_handle_blocked_waiting_request": "self, request",
        "_is_blocked_waiting_status": "status",  # in 0.29 and 0.30, as the next one
        "_try_promote_blocked_waiting_request": "self, request",
        "_preempt_request": "self, request, timestamp, drop_stale_output=False",
        "_free_request": "self, request, delay_free_blocks=False",
    },
    "vllm.v1.executor.abstract:Executor": {
        "__init__": "self, vllm_config",
        "collective_rpc": "self, method, timeout=None, args=(), kwargs=None, non_block=False",
        "add_lora": "self, lora_request",
        "remove_lora": "self, lora_id",
        "pin_lora": "self, lora_id",
    },
    "vllm.v1.core.kv_cache_manager:KVCacheManager": {
        "get_block_ids": "self, request_id",
        "evict_blocks": "self, block_ids",
    },
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager": {
        "create_lora_manager": "self, model, vllm_config",
        "set_active_adapters": "self, requests, mapping",
        "add_adapter": "self, lora_request",
        "remove_adapter": "self, adapter_id",
        "remove_all_adapters": "self",
        "add_dummy_lora": "self, lora_request, rank",
    },
    "vllm.v1.worker.gpu.lora_utils:LoraState": {
        "make_lora_inputs": "self, req_ids, idx_mapping, num_scheduled_tokens",
    },
    "vllm.lora.model_manager:LoRAModelManager": {
        "_init_punica_wrapper": "self, max_num_batched_tokens, vllm_config",
        "_get_punica_wrapper": "self, module_name",
        "_create_lora_modules": "self",
        "set_adapter_mapping": "self, mapping",
    },
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase": {
        "update_metadata": "self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs",
        "add_lora_linear": "self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, "
        "buffer=None, **kwargs",
        "add_shrink": "self, y, x, lora_a_stacked, scale, **kwargs",
        "add_expand": "self, y, x, lora_b_stacked, output_slices, offset_start=0, "
        "add_inputs=True, **kwargs",
        "add_lora_embedding": "self, y, x, lora_b_stacked, add_inputs=True, **kwargs",
        "add_lora_logits": "self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, "
        "**kwargs",
        "apply_lora_full_linear": "self, y, x, weight_stacked, bias_stacked, module_enabled",
    },
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts": {
        "apply": "self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, "
        "global_num_experts, expert_map, a1q_scale, a2_scale, workspace13, workspace2, "
        "expert_tokens_meta, apply_router_weight_on_input",
    },
}
"""By class, its methods and their parameters, in all supported versions that have them."""
