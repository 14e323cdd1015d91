"""What a model's LoRA layers have allocated: counted from the tensors, logged, cleared by slot."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.platforms import current_platform

from multilora_kernels.dtypes import of_torch
from vllm_multilora.slots.budget import CpuBudget, machine_memory, readable

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.layers import BaseLayerWithLoRA

    from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper

logger = logging.getLogger(__name__)


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


class SlotRests:
    """Clears what a slot's last adapter has left past the new one's ranks.

    Kernels of vLLM's multiply by all ranks.

    Args:
        slices: By row in the rank tables, the slots of the slices that vLLM's kernels read: of A
            [slots, ..., ranks, inputs], and of B [slots, ..., outputs, ranks]; None where nobody
            multiplies by it.
    """

    def __init__(
        self, slices: Mapping[int, tuple[torch.Tensor | None, torch.Tensor | None]]
    ) -> None:
        self._slices = dict(slices)

    def clear(
        self, slot: int, shrink: npt.NDArray[np.int32], expand: npt.NDArray[np.int32]
    ) -> None:
        """Clears a slot, in the order of the current stream; for slots that no step uses.

        Args:
            slot: The slot.
            shrink: [rows of the rank tables], true ranks of A.
            expand: The same of B.
        """
        rests = []
        for row, (a, b) in self._slices.items():
            if a is not None:
                rests.append(a[slot][..., int(shrink[row]) :, :])
            if b is not None:
                rests.append(b[slot][..., int(expand[row]) :])
        rests = [rest for rest in rests if rest.numel()]
        if rests:
            torch._foreach_zero_(rests)


def report_slots(manager: Any, budget: CpuBudget, vllm_config: VllmConfig) -> None:
    """Logs what a model manager's slots and host copies take, as it has been allocated."""
    parallel, lora_config = vllm_config.parallel_config, manager.lora_config
    if parallel.rank != 0 or parallel.data_parallel_rank != 0:
        return
    dtype: Any = lora_config.lora_dtype
    taken, slots = manager.allocated_bytes, manager.lora_slots
    if manager.device.type == "cpu":
        of_what, memory = "the machine's %s", machine_memory()
    else:
        of_what, memory = (
            "a GPU's %s, which the KV cache lacks",
            current_platform.get_device_total_memory(),
        )
    workers = parallel.world_size_across_dp
    logger.info(
        "Adapter slots: %d of rank %d in %s take %s, %s each: %.1f %% of %s. Adapters in host "
        "memory: up to %s.%s `vllm-multilora plan` shows what other settings would take.",
        slots,
        lora_config.max_lora_rank,
        of_torch(dtype),
        readable(taken),
        readable(taken // slots),
        100 * taken / memory,
        of_what % readable(memory),
        budget,
        f" Each of the {workers} workers takes as much." if workers > 1 else "",
    )
