"""The base layers' products of a step, by the C kernels and as vLLM computes them on a CPU.

All linear layers of SmolLM2-135M with its output layer, each with weights of its own, so that none
lies in a cache: 270 MB in bfloat16. Each round multiplies some rows by all of them, by either, one
after the other and every other round in reverse.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.harness.turns import paired
from benchmarks.steps.cpu_throughput import fastest_dtype

LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))
LAYERS, OUTPUTS = 30, (49152, 576)


@benchmark(
    workload="all linear layers of SmolLM2-135M and its output layer, 1 to 64 rows, on one thread",
    control="oneDNN as vLLM calls it, in the same rounds",
    figure="the C kernels' time divided by oneDNN's",
    compares_to="1, vLLM's own",
    quick={"rounds": 1, "rows": "16"},
)
def base_products(
    rounds: int = 15, rows: str = "1,4,8,16,32,64", dtype: str = "auto", threads: int = 1
) -> Iterable[Figure]:
    """The base layers' products of a step, by the C kernels and as vLLM computes them on a CPU.

    Args:
        rounds: Of both.
        rows: How many there are, several with commas.
        dtype: Of weights and rows; `auto` is the one that this processor is fastest with.
        threads: On how many both compute.
    """
    import torch
    from vllm import _custom_ops as ops

    from multilora_kernels.native.packed_linear import pack

    torch.set_num_threads(threads)
    kind = getattr(torch, fastest_dtype() if dtype == "auto" else dtype)
    shapes = [*LAYER * LAYERS, OUTPUTS]
    ours: list[Callable[[torch.Tensor], torch.Tensor]] = []
    theirs: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for shape in shapes:
        weight = torch.randn(shape, dtype=kind) * 0.02
        packed, handler = pack(weight), ops.create_onednn_mm(weight.t(), 32)
        assert packed is not None, "the C kernels do not multiply by such weights here"
        ours.append(packed)
        theirs.append(lambda x, handler=handler: ops.onednn_mm(handler, x, None))

    def milliseconds(
        layers: Sequence[Callable[[torch.Tensor], torch.Tensor]], xs: dict[int, torch.Tensor]
    ) -> float:
        begin = time.perf_counter()
        for layer, (_, k) in zip(layers, shapes, strict=True):
            layer(xs[k])
        return (time.perf_counter() - begin) * 1e3

    for count in map(int, rows.split(",")):
        xs = {k: torch.randn(count, k, dtype=kind) for _, k in LAYER}
        acts = {"C": partial(milliseconds, ours, xs), "oneDNN": partial(milliseconds, theirs, xs)}
        found, case = paired(acts, rounds), f"{count} rows"
        for name in acts:
            yield Figure(case, f"{name}, ms", [each[name] for each in found])
        yield Figure(case, "C / oneDNN", [each["C"] / each["oneDNN"] for each in found])
