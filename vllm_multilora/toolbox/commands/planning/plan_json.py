"""A plan as JSON."""

from __future__ import annotations

from typing import Any

from vllm_multilora.integration.offline.base_model import KvCache
from vllm_multilora.toolbox.planning.memory_plan import MemoryPlan
from vllm_multilora.toolbox.planning.plan_hints import Advice


def plan_as_json(plan: MemoryPlan) -> dict[str, Any]:
    """What `json.dumps` takes; sizes are in bytes, and one worker's unless their name says so."""
    model, memory = plan.model, plan.memory
    return {
        "model": model.name,
        "architecture": model.architecture,
        "dtype": model.dtype,
        "lora_dtype": model.lora_dtype,
        "tensor_parallel_size": model.tensor_parallel_size,
        "fully_sharded": model.fully_sharded,
        "weight_bytes": model.weight_bytes,
        "max_loras": plan.max_loras,
        "max_lora_rank": plan.max_lora_rank,
        "slot_bytes": memory.slot_bytes,
        "fixed_bytes": memory.fixed_bytes,
        "total_bytes": plan.total,
        "staging_bytes": model.staging_bytes,
        "layers": [
            {"name": part.name, "slot_bytes": part.slot_bytes, "fixed_bytes": part.fixed_bytes}
            for part in memory.layers
        ],
        "plugin_tables": [
            {"name": part.name, "slot_bytes": part.slot_bytes, "fixed_bytes": part.fixed_bytes}
            for part in memory.tables
        ],
        "kv_cache": _kv_cache(model.kv_cache, plan),
        "totals": [
            {"max_loras": slots, "max_lora_rank": rank, "bytes": model.by_rank[rank].total(slots)}
            for slots in plan.slot_counts
            for rank in plan.compared_ranks
        ],
        "host": {
            "largest_adapter_bytes": memory.largest_adapter,
            "least_cache_bytes_of_all_workers": plan.host_least,
        },
        "adapters": _adapters(plan),
        "advice": _advice(plan.advice),
    }


def _kv_cache(cache: KvCache | None, plan: MemoryPlan) -> dict[str, Any] | None:
    if cache is None:
        return None
    found: dict[str, Any] = {
        "token_bytes": cache.token_bytes,
        "max_model_len": cache.model_len,
        "tokens_taken": cache.tokens(plan.total),
        "requests_taken": cache.requests(plan.total),
    }
    if plan.budget is not None:
        left = max(0, plan.left or 0)
        found |= {
            "most_tokens_left": cache.tokens(left),
            "most_requests_left": cache.requests(left),
        }
    return found


def _adapters(plan: MemoryPlan) -> dict[str, Any] | None:
    if plan.survey is None:
        return None
    return {
        "accepted": [
            {
                "name": adapter.name,
                "kind": adapter.kind,
                "rank": adapter.rank,
                "host_bytes_of_all_workers": plan.host_bytes[adapter.name],
            }
            for adapter in plan.survey.adapters
        ],
        "refused": [
            {"name": name, "problems": [problem.as_dict() for problem in problems]}
            for name, problems in plan.survey.refused
        ],
    }


def _advice(advice: Advice | None) -> dict[str, Any] | None:
    if advice is None:
        return None
    unused = advice.unused
    return {
        "max_lora_rank": advice.max_lora_rank,
        "by_rank": [
            {"rank": need.rank, "fits": need.fits, "left_out": need.left_out, "bytes": need.bytes}
            for need in advice.needs
        ],
        "unused_layers": None
        if unused is None
        else {"layers": unused.suffixes, "lora_target_modules": unused.targets}
        | {"bytes": unused.bytes},
    }
