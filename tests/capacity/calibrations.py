"""A calibration of round numbers."""

from typing import Any

from vllm_multilora.slots.budget import MIB
from vllm_multilora.toolbox.capacity.calibration import (
    FORMAT,
    Calibration,
    LoadCosts,
    Machine,
    Ranges,
    Residual,
    Settings,
    versions_here,
)
from vllm_multilora.toolbox.capacity.step_cost import TERMS

STEP_S = dict.fromkeys(TERMS, 0.0) | {"step": 1.0, "prompt_token": 0.01, "generated_token": 0.1}
REQUEST_S = 0.5
LOADS = LoadCosts(
    fixed_s=1.0,
    s_per_mib=0.5,
    beside_fixed_s=2.0,
    beside_s_per_mib=1.0,
    copy_fixed_s=0.5,
    copy_s_per_mib=0.25,
    source="page cache",
    measured=4,
)
"""An adapter of 2 MiB is read in 2 s, in 4 s beside steps, and copied in 1 s."""


def calibration(**changes: Any) -> Calibration:
    """One with these attributes."""
    attributes: dict[str, Any] = {
        "format": FORMAT,
        "created": "2026-11-27T00:00:00+00:00",
        "machine": Machine(processor="abacus", cores=2, system="Linux"),
        "versions": {"vllm": "0.32.0"} | versions_here(),
        "model": ["base", "/models/tiny"],
        "settings": Settings(
            max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128, max_loras=2, kv_tokens=512
        ),
        "step_s": STEP_S,
        "request_s": REQUEST_S,
        "request_beside_s": REQUEST_S,
        "residual": Residual(rms=0.01, worst=0.02, worst_case="none", steps=10),
        "loads": LOADS,
        "ranges": Ranges(
            prompt_tokens=64,
            rows=4,
            prompt_pairs=10_000,
            context_tokens=400,
            adapter_bytes=8 * MIB,
            load_bytes=4 * MIB,
        ),
        "adapters": {"a": 2 * MIB, "b": 2 * MIB},
    }
    return Calibration(**(attributes | changes))
