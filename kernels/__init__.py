"""Segmented LoRA kernels: many adapters in one batch, each row paying for its own rank only.

    plan = BatchPlan.build(token_slots, max_loras)
    lora_linear(y, x, lora_a, lora_b, ranks, plan)

See `api` for shapes and semantics, `reference` for the specification in plain loops, and
README.md for how the kernels work. This package knows nothing of vLLM.
"""

from multilora_kernels import host_memory, reference
from multilora_kernels.api import (
    BACKENDS,
    PreparedLinear,
    column_major,
    lora_expand,
    lora_linear,
    lora_shrink,
    resolve_backend,
)
from multilora_kernels.native.compiler import NativeUnavailableError
from multilora_kernels.plan import BatchPlan, PlanLayout
from multilora_kernels.scatter import SlotTable
from multilora_kernels.triton_availability import TritonUnavailableError

__all__ = [
    "BACKENDS",
    "BatchPlan",
    "NativeUnavailableError",
    "PlanLayout",
    "PreparedLinear",
    "SlotTable",
    "TritonUnavailableError",
    "column_major",
    "host_memory",
    "lora_expand",
    "lora_linear",
    "lora_shrink",
    "reference",
    "resolve_backend",
]
