"""Host time of one call of a layer's Triton kernels, without what Triton itself takes.

    python -m tools.kernels.launch_cost

A GPU that computes a layer in less time than the host needs to launch it waits for the host,
wherever no graph is replayed. Measured is all that this package does between `PreparedLinear` and
Triton, with the launches themselves left out: checks, grids, buffers between the halves, the
kernels' arguments. Beside it the same call without preparation. Blocks and grids are an H100's;
no GPU is needed, and none is measured. Minimum over repeats, on one thread.
"""

from __future__ import annotations

import os
import sys
import timeit
from collections.abc import Callable
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # these kernels on CPU tensors; before Triton is imported

import numpy as np
import torch

from multilora_kernels import BatchPlan, PlanLayout, PreparedLinear, lora_linear
from tools.kernels.measure.batches import LAYERS

SLOTS, MAX_RANK, MAX_TOKENS, TILE_ROWS = 16, 64, 8192, 128
CALLS = {"decode": 64, "prefill of 600": 600, "prefill of 8192": 8192}


def measure(layer: str, tokens: int, backend: str) -> tuple[float, float]:
    """Microseconds of a call of a prepared layer, and of one that is not prepared."""
    inputs, outputs = LAYERS[layer].inputs, LAYERS[layer].outputs

    def weights(*shape: int) -> torch.Tensor:
        return torch.empty(SLOTS, 1, *shape, dtype=torch.bfloat16)

    lora_a = tuple(weights(MAX_RANK, inputs) for _ in outputs)
    lora_b = tuple(weights(width, MAX_RANK) for width in outputs)
    ranks = torch.full((len(outputs), SLOTS), MAX_RANK, dtype=torch.int32)
    plan = BatchPlan(PlanLayout(MAX_TOKENS, SLOTS, TILE_ROWS))
    plan.update(np.arange(tokens) % SLOTS)
    x = torch.empty(tokens, inputs, dtype=torch.bfloat16)
    y = torch.empty(tokens, sum(outputs), dtype=torch.bfloat16)
    prepared = PreparedLinear(lora_a, lora_b, ranks, plan.layout, backend=backend)
    return (
        best(lambda: prepared(y, x, plan)),
        best(lambda: lora_linear(y, x, lora_a, lora_b, ranks, plan, backend=backend)),
    )


def best(function: Callable[[], None]) -> float:
    """Microseconds of a call, the least over repeats."""
    function()
    return min(timeit.repeat(function, number=200, repeat=25)) / 200 * 1e6


def main() -> int:
    """Prints the table."""
    from multilora_kernels.triton.launch import DeviceFacts, Launch
    from tools.kernels.measure.interpreter import launched_as_on

    print("| layer | batch | backend | prepared | not prepared |\n|---|---|---|---:|---:|")
    facts = DeviceFacts("sm_90", 132, pdl=False)
    with launched_as_on(facts), patch.object(Launch, "run", lambda launch: None):
        for layer in ("8b.qkv", "8b.o"):
            for name, tokens in CALLS.items():
                for backend in ("triton", "triton-invariant"):
                    prepared, plain = measure(layer, tokens, backend)
                    print(f"| {layer} | {name} | {backend} | {prepared:.1f} us | {plain:.1f} us |")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
