"""Compiles the Triton kernels that serving will need, before there are requests to delay.

The blocks of a kernel depend on a layer's shape and on the number of rows. vLLM's own warm-up meets
few numbers of rows; each other one would compile for a second or more in the middle of a step, with
all tenants waiting. Here, each layer is called once for every power of two, which also makes it
prepare its launches. The plan is still empty then, so the kernels start and end without reading or
writing anything. The addresses of activations make no difference to a kernel
(`multilora_kernels.triton.activations`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)

from multilora_kernels import SlotTable
from vllm_multilora.integration.worker.model.model_layout import is_ranked
from vllm_multilora.integration.worker.model.output_factors import first_column, is_sharded
from vllm_multilora.wording import counted

logger = logging.getLogger(__name__)


def prepare(layer: BaseLayerWithLoRA) -> None:
    """Describes a layer's weights for its calls in compiled code, before that is compiled.

    Output layers are never compiled: they are prepared when they are first called.

    Args:
        layer: With its own `MultiLoRAPunicaWrapper` and ranks that are tracked.
    """
    wrapper: Any = layer.punica_wrapper
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        wrapper.expand(b)
    elif is_sharded(layer):
        wrapper.shrink(a)
        wrapper.expand(b, first_column(layer))
    elif not isinstance(layer, LogitsProcessorWithLoRA):
        wrapper.linear(a, b)


def warm_up(
    layers: Iterable[BaseLayerWithLoRA],
    dtype: torch.dtype,
    slots: SlotTable,
    *,
    workers: int = 1,
    worker: int = 0,
) -> None:
    """Calls each layer's kernels once for every number of rows that may choose other blocks.

    Of an output layer, too: with `prompt_logprobs` or drafted tokens it has several for a request.
    MoE expert layers, whose kernels are vLLM's, and classification heads, which run once for a
    request, are left out. All kernels are compiled in several processes before the calls.

    Args:
        layers: Layers with their own `MultiLoRAPunicaWrapper`, before the first step.
        dtype: Of the model's activations.
        slots: Fills slots, with kernels of its own.
        workers: Processes of this machine that warm up at the same time.
        worker: The number of this one of them.
    """
    begin = time.perf_counter()
    ranked: list[Any] = [layer for layer in layers if is_ranked(layer)]

    def call_all() -> None:
        for layer in ranked:
            for rows in _row_counts(layer.punica_wrapper.plan.layout.max_tokens):
                _call(layer, rows, dtype)
        slots.warm_up()

    compiled = ""
    if any(layer.punica_wrapper.backend.startswith("triton") for layer in ranked):
        from multilora_kernels.triton.compiling.compile_ahead import call_compiled  # imports Triton

        found = call_compiled(call_all, workers=workers, worker=worker)
        compiled = (
            f": {counted(found.kernels, 'kernel')}, of which {found.processes} processes compiled "
            f"what Triton's cache lacked, and this one {len(found.late)}"
        )
    else:
        call_all()
    logger.info(
        "LoRA kernels for %s of layer are ready after %.1f s%s.",
        counted(len(set(map(_kind, ranked))), "kind"),
        time.perf_counter() - begin,
        compiled,
    )


def _kind(layer: Any) -> tuple[Any, ...]:
    factors, most = layer.punica_wrapper.factors, layer.punica_wrapper.plan.layout.max_tokens
    has_bias = None if factors is None else factors.bias is not None
    return type(layer), most, has_bias, *map(_facts, _weights(layer))


def _weights(layer: Any) -> tuple[torch.Tensor, ...]:
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    return (*a, *b) if isinstance(a, tuple) else (a, b)


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _row_counts(most: int) -> Iterator[int]:
    rows = 1
    while rows < most:
        yield rows
        rows *= 2
    yield most


def _call(layer: Any, rows: int, dtype: torch.dtype) -> None:
    wrapper, a, b = layer.punica_wrapper, layer.lora_a_stacked, layer.lora_b_stacked

    def activations(width: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        """[rows, width] with the memory of one row: nothing will touch it."""
        return torch.empty(width, dtype=dtype, device=wrapper.device).expand(rows, width)

    def half(weights: tuple[torch.Tensor, ...], rank: int) -> torch.Tensor:
        shape = len(weights), rows, rank
        return torch.empty(shape, dtype=torch.float32, device=wrapper.device)

    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        found = torch.empty(rows, b.size(-1), dtype=b.dtype, device=wrapper.device)
        wrapper.add_lora_embedding(activations(b.size(-2)), found, b)
    elif isinstance(layer, LogitsProcessorWithLoRA):
        # Logits end with the padding of vLLM's vocabulary, to a multiple of 64.
        columns = -(-b.size(-2) // 64) * 64
        y = activations(columns, getattr(layer.base_layer, "head_dtype", None) or dtype)
        # Over the tokens' plan: that of the sampled rows begins with a step.
        wrapper.logits(a, b, columns)(y, activations(a.size(-1)), wrapper.plan)
    elif is_sharded(layer):
        offset, width = first_column(layer), sum(each.size(-2) for each in b)
        wrapper.add_shrink(half(a, a[0].size(-2)), activations(a[0].size(-1)), a, 1.0)
        # With memory of its own: it is copied back where the offset is no multiple of 16.
        y = torch.empty(rows, offset + width, dtype=dtype, device=wrapper.device)
        h = half(b, b[0].size(-1))
        wrapper.add_expand(y, h, b, layer.output_slices, offset_start=offset)
    else:
        base, width = layer.base_layer, sum(each.size(-2) for each in b)
        # Routers of experts may take and give float32. And where vLLM computes adapters' products
        # beside the base's, it does not in every layer.
        for own in dict.fromkeys((dtype, base.params_dtype)):
            y = activations(width, getattr(base, "out_dtype", None) or own)
            x = activations(a[0].size(-1), own)
            for add in (True, False) if layer._enable_aux_cuda_stream else (True,):
                wrapper.add_lora_linear(y, x, a, b, 1.0, layer.output_slices, add_inputs=add)
