"""Segmented LoRA kernels: many adapters in one batch, each row paying for its own rank only.

    plan = BatchPlan.build(token_slots, max_loras)
    lora_linear(y, x, lora_a, lora_b, ranks, plan)

See `api` for shapes and semantics, `reference` for the specification in plain loops, and
README.md for how the kernels work. This package knows nothing of vLLM.

What computes is imported when it is first asked for, so that `dtypes` can be had without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multilora_kernels import host_memory, reference
    from multilora_kernels.api import column_major, lora_expand, lora_linear, lora_shrink
    from multilora_kernels.backends import BACKENDS, resolve_backend
    from multilora_kernels.factors import OutputFactors
    from multilora_kernels.launches.prepared import PreparedExpand, PreparedLinear, PreparedShrink
    from multilora_kernels.native.builds import NativeUnavailableError
    from multilora_kernels.packs.scatter import SlotIndex, SlotTable
    from multilora_kernels.plan import BatchPlan, PlanLayout
    from multilora_kernels.triton_availability import TritonUnavailableError

__all__ = [
    "BACKENDS",
    "BatchPlan",
    "NativeUnavailableError",
    "OutputFactors",
    "PlanLayout",
    "PreparedExpand",
    "PreparedLinear",
    "PreparedShrink",
    "SlotIndex",
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

_HOMES = {
    "BACKENDS": "backends",
    "BatchPlan": "plan",
    "NativeUnavailableError": "native.builds",
    "OutputFactors": "factors",
    "PlanLayout": "plan",
    "PreparedExpand": "launches.prepared",
    "PreparedLinear": "launches.prepared",
    "PreparedShrink": "launches.prepared",
    "SlotIndex": "packs.scatter",
    "SlotTable": "packs.scatter",
    "TritonUnavailableError": "triton_availability",
    "resolve_backend": "backends",
}
_MODULES = ("host_memory", "reference")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
