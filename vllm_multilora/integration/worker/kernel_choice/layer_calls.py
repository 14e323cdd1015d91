"""The calls of a model's layers that kernels are chosen for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm import envs
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)

from multilora_kernels.trial.kinds import LayerKind
from vllm_multilora.integration.step.punica_prepared import CallKey
from vllm_multilora.integration.worker.model.model_layout import is_ranked
from vllm_multilora.integration.worker.model.output_factors import first_column, is_sharded

VOCABULARY_MULTIPLE = 64
"""Logits end with the padding of vLLM's vocabulary."""


def layer_calls(layer: Any, dtype: torch.dtype) -> Iterator[tuple[CallKey, LayerKind]]:
    """The calls of one layer, by the keys of `PreparedLayers.take_kernels`.

    A key comes twice where a layer's rows may have two types. Layers without tracked ranks have
    none: vLLM's kernels serve experts, and ours classification heads.
    """
    if not isinstance(layer, BaseLayerWithLoRA) or not is_ranked(layer):
        return
    a: Any = layer.lora_a_stacked
    b: Any = layer.lora_b_stacked
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        kind = LayerKind.of_expand((b,), b.dtype, dtype, columns=b.size(-2))
        yield ("expand", 0, True), kind
    elif isinstance(layer, LogitsProcessorWithLoRA):
        y = getattr(layer.base_layer, "head_dtype", None) or dtype
        columns = -(-b.size(-2) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        yield ("logits",), LayerKind.of_linear((a,), (b,), dtype, y, columns=columns)
    elif is_sharded(layer):
        offset, width = first_column(layer), sum(each.size(-2) for each in b)
        yield ("shrink",), LayerKind.of_shrink(a, dtype, torch.float32)
        kind = LayerKind.of_expand(b, torch.float32, dtype, columns=offset + width, offset=offset)
        yield ("expand", offset, True), kind
    else:
        base, width = layer.base_layer, sum(each.size(-2) for each in b)
        for own in dict.fromkeys((dtype, base.params_dtype)):
            y = getattr(base, "out_dtype", None) or own
            for add in (True, False) if envs.VLLM_LORA_ENABLE_DUAL_STREAM else (True,):
                kind = LayerKind.of_linear(a, b, own, y, columns=width, add_inputs=add)
                yield ("linear", add), kind
