"""Host time of one call of a layer's Triton kernels, without what the driver takes.

    python -m tools.kernels.launch_cost

A GPU that computes a layer in less time than the host needs to launch it waits for the host,
wherever no graph is replayed. Measured is all that happens in Python: this package's checks, grids
and buffers between the halves, and Triton's own work for a launch. Left out are the kernels,
Triton's launcher in C and the driver (`measure/compiled/without_card.py`). No GPU is needed, and
none is measured. Blocks and grids are an H100's. Minimum over repeats, on one thread.

- operator: `PreparedLinear` as compiled code calls it
- prepared: `PreparedLinear` as eager code calls it
- not prepared: `lora_linear`
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from multilora_kernels import BatchPlan, PlanLayout, PreparedLinear, lora_linear
from tools.kernels.measure.batches import LAYERS

SLOTS, MAX_RANK, MAX_TOKENS = 16, 64, 8192
CALLS = {"decode": 64, "prefill of 600": 600, "prefill of 8192": 8192}
WAYS = ("operator", "prepared", "not prepared")


def measure(layer: str, tokens: int, backend: str) -> dict[str, float]:
    """Microseconds of a call, by how it is made."""
    inputs, outputs = LAYERS[layer].inputs, LAYERS[layer].outputs

    def weights(*shape: int) -> torch.Tensor:
        return torch.empty(SLOTS, 1, *shape, dtype=torch.bfloat16)

    lora_a = tuple(weights(MAX_RANK, inputs) for _ in outputs)
    lora_b = tuple(weights(width, MAX_RANK) for width in outputs)
    ranks = torch.full((len(outputs), SLOTS), MAX_RANK, dtype=torch.int32)
    plan = BatchPlan(PlanLayout(MAX_TOKENS, SLOTS))
    plan.update(np.arange(tokens) % SLOTS)
    x = torch.empty(tokens, inputs, dtype=torch.bfloat16)
    y = torch.empty(tokens, sum(outputs), dtype=torch.bfloat16)
    prepared = PreparedLinear(lora_a, lora_b, ranks, plan.layout, backend=backend)

    def compiled(x: torch.Tensor) -> None:
        prepared(y, x, plan)

    calls: dict[str, Callable[[], Any]] = {
        "operator": _operator_call(compiled, x),
        "prepared": lambda: prepared(y, x, plan),
        "not prepared": lambda: lora_linear(y, x, lora_a, lora_b, ranks, plan, backend=backend),
    }
    return {way: best(calls[way]) for way in WAYS}


def _operator_call(function: Callable[[torch.Tensor], None], x: torch.Tensor) -> Callable[[], Any]:
    """The one operator that compiled code makes of a function, with its arguments."""
    calls: list[Callable[[], Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes = list(graph.graph.nodes)
        given = dict(zip((n for n in nodes if n.op == "placeholder"), inputs, strict=True))
        (call,) = (node for node in nodes if node.op == "call_function")
        arguments = tuple(given[node] for node in call.args)
        calls.append(lambda: call.target(*arguments))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(x)
    return calls[0]


def best(function: Callable[[], Any]) -> float:
    """Microseconds of a call, the least over repeats."""
    with torch.inference_mode():
        function()
        function()
        return min(timeit.repeat(function, number=200, repeat=25)) / 200 * 1e6


def main() -> int:
    """Prints the table."""
    from tools.kernels.measure.compiled.without_card import launched_without_card

    print(f"| layer | batch | backend | {' | '.join(WAYS)} |\n|---|---|---|{'---:|' * len(WAYS)}")
    with launched_without_card() as launches:
        launches.noting = False
        for layer in ("8b.qkv", "8b.o"):
            for name, tokens in CALLS.items():
                for backend in ("triton", "triton-invariant"):
                    times = measure(layer, tokens, backend)
                    cells = " | ".join(f"{times[way]:.1f} us" for way in WAYS)
                    print(f"| {layer} | {name} | {backend} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
