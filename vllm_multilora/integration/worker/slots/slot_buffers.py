"""What a model's LoRA layers have allocated, counted from the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.lora.layers import BaseLayerWithLoRA

    from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper


def layer_bytes(layer: BaseLayerWithLoRA, dtype: torch.dtype | None = None) -> int:
    """Bytes that a layer has allocated for LoRA; the layer it wraps does not count.

    vLLM keeps them as plain attributes, some of them views of others: a storage counts once.

    Args:
        layer: A layer whose slots have been created.
        dtype: Only tensors of this type, such as the adapters'; None: all.
    """
    tensors = _tensors([*vars(layer).values(), *layer.buffers(recurse=False)])
    return _storage_bytes(t for t in tensors if dtype is None or t.dtype == dtype)


def wrapper_bytes(wrapper: MultiLoRAPunicaWrapper) -> int:
    """Bytes on the device of what a punica wrapper prepares for a step."""
    plans = (wrapper.plan.buffer, wrapper.output_rows.buffer)
    return _storage_bytes([*plans, *_tensors(vars(wrapper).values())])


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    # Addresses tell storages apart on devices with memory only; the objects behind them do on all.
    storages = {
        storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)
    }
    return sum(storages.values())


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
