"""Host time to prepare a step's LoRA metadata: this plugin against stock vLLM.

Both sides start from what the model runner has (the requests' adapter ids and token counts)
and end with metadata that the kernels can read: stock through `make_lora_inputs`, `LoRAMapping`
and `PunicaWrapperCPU.update_metadata`, ours through `BatchMapping` and our wrapper's
`update_metadata`. The sampler's plan, which ours builds when an output layer first asks for
it, is counted as if one did. `metadata` leaves out vLLM's building of the tuples. Minimum over
repeats, 32 adapters; the ratio is what counts.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterable

import numpy as np
import torch

from benchmarks.harness.registry import Figure, benchmark

ADAPTERS = 32
VOCABULARY = 49152


def milliseconds(tokens: int, requests: int, repeats: int) -> tuple[float, float, float]:
    """Milliseconds a step of stock in total, of stock's metadata alone, and of ours."""
    from types import SimpleNamespace

    from vllm.lora.layers import LoRAMapping
    from vllm.lora.layers.utils import LoRAMappingType
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from vllm_multilora.integration.step.mapping import BatchMapping
    from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper

    slots: list[int | None] = list(range(1, ADAPTERS + 1))
    ids = np.random.default_rng(0).integers(0, ADAPTERS + 1, requests)
    counts = np.full(requests, tokens // requests, dtype=np.int32)
    samples = np.ones(requests, dtype=np.int32)
    sampled = torch.empty(requests, 1)
    stock = PunicaWrapperCPU(8192, 256, "cpu")
    ours = MultiLoRAPunicaWrapper(
        8192, 256, "cpu", backend="torch", lora_config=SimpleNamespace(max_loras=ADAPTERS)
    )

    def stock_mapping() -> LoRAMapping:
        return LoRAMapping(tuple(ids.repeat(counts)), tuple(ids.repeat(samples)), is_prefill=True)

    def stock_metadata(mapping: LoRAMapping) -> None:
        stock.update_metadata(mapping, slots, ADAPTERS + 1, VOCABULARY)

    def ours_all() -> None:
        mapping = BatchMapping(ids, counts, samples, LoRAMappingType.LANGUAGE)
        ours.update_metadata(mapping, slots, ADAPTERS + 1, VOCABULARY)
        ours.output_rows.plan(sampled)

    mapping = stock_mapping()
    return (
        best(lambda: stock_metadata(stock_mapping()), repeats),
        best(lambda: stock_metadata(mapping), repeats),
        best(ours_all, repeats),
    )


def best(function: Callable[[], None], repeats: int) -> float:
    """Milliseconds of a call, the least over repeats."""
    number = max(1, int(0.02 / max(1e-6, timeit.timeit(function, number=1))))
    return min(timeit.repeat(function, number=number, repeat=repeats)) / number * 1e3


@benchmark(
    workload="32 adapters; turning what the model runner knows of a step into what kernels read",
    control="vLLM's own metadata, in the same process",
    figure="time divided by that of vLLM's metadata alone",
    compares_to="stock vLLM",
    quick={"repeats": 2},
)
def plan_cost(repeats: int = 15) -> Iterable[Figure]:
    """Host time to prepare a step's LoRA metadata: this plugin against stock vLLM."""
    torch.set_num_threads(1)
    for tokens, requests in ((64, 64), (2048, 32), (8192, 64)):
        total, metadata, own = milliseconds(tokens, requests, repeats)
        case = f"{tokens:,} tokens of {requests} requests"
        yield Figure(case, "stock in total, ms", [total])
        yield Figure(case, "stock's metadata, ms", [metadata])
        yield Figure(case, "plugin, ms", [own])
        yield Figure(case, "plugin / stock's metadata", [own / metadata])
