"""Compiles the Triton kernels that serving will need, before there is anyone to keep waiting.

Which blocks a kernel has depends on a layer's shape and on the number of rows. vLLM's own warm-up
meets few numbers of rows; every other one would compile for a second or more in the middle of a
step, with all tenants waiting. Here each layer is called once for every power of two, which also
has it work out its launches. The plan is still empty then, so that the kernels start and end
without reading or writing anything.
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

from vllm_multilora.integration.worker.layout import is_ranked

logger = logging.getLogger(__name__)


def warm_up(layers: Iterable[BaseLayerWithLoRA]) -> None:
    """Calls each layer's kernels once for every number of rows that may choose other blocks.

    MoE expert layers, whose kernels are vLLM's, and classification heads, which run once for a
    request, are left out.

    Args:
        layers: Layers with their own `MultiLoRAPunicaWrapper`, before the first step.
    """
    begin, seen = time.perf_counter(), set()
    for layer in layers:
        if not is_ranked(layer):
            continue
        wrapper: Any = layer.punica_wrapper
        is_output = isinstance(layer, LogitsProcessorWithLoRA)
        most = wrapper.max_batches if is_output else wrapper.plan.layout.max_tokens
        factors = wrapper.factors
        has_bias = None if factors is None else factors.bias is not None
        signature = type(layer), most, has_bias, *map(_facts, _weights(layer))
        seen.add(signature)
        for rows in _row_counts(most):
            _call(layer, rows)
    logger.info(
        "LoRA kernels for %d kinds of layer are ready after %.1f s.",
        len(seen),
        time.perf_counter() - begin,
    )


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


def _call(layer: Any, rows: int) -> None:
    wrapper, a, b = layer.punica_wrapper, layer.lora_a_stacked, layer.lora_b_stacked
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        wrapper.add_lora_embedding(_activations(rows, b.size(-2), b), _dense(rows, b), b)
    elif isinstance(layer, LogitsProcessorWithLoRA):
        # Logits end with the padding of vLLM's vocabulary, to a multiple of 64.
        y = _activations(rows, -(-b.size(-2) // 64) * 64, b)
        x = _activations(rows, a.size(-1), a)
        # Over the tokens' plan: that of the sampled rows begins with a step.
        wrapper.add_lora_linear(y, x, (a,), (b,), 1.0, (b.size(-2),))
    else:
        y = _activations(rows, sum(each.size(-2) for each in b), b[0])
        x = _activations(rows, a[0].size(-1), a[0])
        if layer.lora_config.fully_sharded_loras:
            shape = len(a), rows
            h = torch.empty(*shape, a[0].size(-2), dtype=torch.float32, device=x.device)
            wrapper.add_shrink(h, x, a, 1.0)
            h = torch.empty(*shape, b[0].size(-1), dtype=torch.float32, device=x.device)
            wrapper.add_expand(y, h, b, layer.output_slices)
        else:
            aside = {"add_inputs": False} if layer._enable_aux_cuda_stream else {}
            wrapper.add_lora_linear(y, x, a, b, 1.0, layer.output_slices, **aside)


def _dense(rows: int, b: torch.Tensor) -> torch.Tensor:
    return torch.empty(rows, b.size(-1), dtype=b.dtype, device=b.device)


def _activations(rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """[rows, width] with hardly any memory behind it: nothing will touch it.

    Triton compiles anew only for another alignment of the row's length.
    """
    row = 0 if width % 16 == 0 else 17
    storage = torch.empty(width + row * (rows - 1), dtype=like.dtype, device=like.device)
    return storage.as_strided((rows, width), (row, 1))
