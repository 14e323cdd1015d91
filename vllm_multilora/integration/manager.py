"""The worker's LoRA manager: vLLM's, plus the true rank of every module in every slot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ClassificationHeadWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.utils import LoRAMappingType
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from multilora_kernels import column_major
from vllm_multilora.integration.mapping import BatchMapping
from vllm_multilora.integration.punica import MultiLoRAPunicaWrapper


@dataclass(frozen=True)
class _RankedLayer:
    """A layer whose true ranks are tracked, and its rows in the rank tables.

    Attributes:
        name: The module's full name.
        rows: Its slices' rows in the tables.
        first_rank: The first rank of lora_a that this worker holds; not 0 only where tensor
            parallelism shards the rank dimension.
        held_ranks: How many ranks of lora_a this worker holds.
    """

    name: str
    rows: slice
    first_rank: int
    held_ranks: int


class MultiLoRAModelManager(LRUCacheLoRAModelManager):
    """Gives every layer a punica wrapper that knows the true ranks of the adapters in its slots."""

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        self._ranked: list[_RankedLayer] = []
        ranked: list[tuple[_RankedLayer, BaseLayerWithLoRA]] = []
        rows = 0
        for name, module in self.modules.items():
            if not _is_ranked(module):
                continue
            shard = module.lora_a_stacked[0].shape[-2] if _shards_ranks(module) else 0
            slices = getattr(module, "n_slices", 1)
            layer = _RankedLayer(
                name,
                slice(rows, rows + slices),
                first_rank=module.tp_rank * shard if shard else 0,
                held_ranks=shard or self.lora_config.max_lora_rank,
            )
            ranked.append((layer, module))
            rows += slices
        shape = (rows, self.lora_slots)
        self._shrink_ranks = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._expand_ranks = torch.zeros(shape, dtype=torch.int32, device=self.device)
        for layer, module in ranked:
            if isinstance(module, BaseLinearLayerWithLoRA) and self.device.type == "cpu":
                # vLLM addresses the slots through this attribute; how they are stored is ours.
                module.lora_b_stacked = tuple(column_major(b) for b in module.lora_b_stacked)
            wrapper = module.punica_wrapper
            assert isinstance(wrapper, MultiLoRAPunicaWrapper)
            module.set_mapping(
                wrapper.for_layer(self._shrink_ranks[layer.rows], self._expand_ranks[layer.rows])
            )
            self._ranked.append(layer)

    def activate_adapter(self, lora_id: int) -> bool:
        """Moves an adapter into a slot, and notes its true rank in every module."""
        activated = super().activate_adapter(lora_id)
        if activated:
            self._record_ranks(self.lora_index_to_id.index(lora_id), lora_id)
        return activated

    def _record_ranks(self, slot: int, lora_id: int) -> None:
        adapter = self._registered_adapters.cache[lora_id]
        shrink = np.zeros(len(self._shrink_ranks), dtype=np.int32)
        expand = np.zeros(len(self._expand_ranks), dtype=np.int32)
        for layer in self._ranked:
            weights = self._get_lora_layer_weights(adapter, layer.name)
            if weights is not None:
                ranks = _true_ranks(weights, layer.rows.stop - layer.rows.start)
                expand[layer.rows] = ranks
                shrink[layer.rows] = np.clip(ranks - layer.first_rank, 0, layer.held_ranks)
        self._shrink_ranks[:, slot] = torch.from_numpy(shrink)
        self._expand_ranks[:, slot] = torch.from_numpy(expand)


class MultiLoRAWorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's worker manager over `MultiLoRAModelManager`."""

    _manager_cls = MultiLoRAModelManager

    @contextmanager
    def rows_from_prompts(self, hidden_states: torch.Tensor) -> Iterator[None]:
        """Within it, output layers get prompts' rows; see `OutputRows.from_prompts`."""
        with ExitStack() as stack:
            for wrapper in self._adapter_manager.punica_wrapper_mapping.values():
                if isinstance(wrapper, MultiLoRAPunicaWrapper):
                    stack.enter_context(wrapper.output_rows.from_prompts(hidden_states))
            yield

    def activate_batch(
        self,
        input_batch: Any,
        num_scheduled_tokens: npt.NDArray[np.integer],
        num_sampled_tokens: npt.NDArray[np.integer] | None,
        mapping_type: LoRAMappingType = LoRAMappingType.LANGUAGE,
    ) -> None:
        """Puts a batch's adapters into slots and tells the kernels which rows are whose.

        Takes the place of the mixin's `set_active_loras`, without its tuples per token.

        Args:
            input_batch: The model runner's batch.
            num_scheduled_tokens: [requests], tokens each request has in this step.
            num_sampled_tokens: [requests], rows of each request that reach the logits; None
                for one each.
            mapping_type: vLLM's mapping type.
        """
        ids = input_batch.request_lora_mapping[: input_batch.num_reqs]
        self.set_active_adapters(
            set(input_batch.lora_id_to_lora_request.values()),
            BatchMapping(ids, num_scheduled_tokens, num_sampled_tokens, mapping_type),
        )


def _is_ranked(module: BaseLayerWithLoRA) -> bool:
    """Whether our wrapper tracks ranks for a layer; others are computed at the full rank.

    Classification heads are not: vLLM compares their wrapper's identity with the model's.
    """
    kinds = (BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA)
    return (
        isinstance(module, kinds)
        and not isinstance(module, ClassificationHeadWithLoRA)
        and isinstance(module.punica_wrapper, MultiLoRAPunicaWrapper)
    )


def _shards_ranks(module: BaseLayerWithLoRA) -> bool:
    """Whether this layer holds only a share of lora_a's ranks (`fully_sharded_loras`)."""
    return (
        isinstance(module, BaseLinearLayerWithLoRA)
        and module.lora_a_stacked[0].shape[-2] < module.lora_b_stacked[0].shape[-1]
    )


def _true_ranks(weights: LoRALayerWeights, slices: int) -> npt.NDArray[np.int32]:
    """The rank of each slice; 0 where the adapter leaves a slice alone."""
    if isinstance(weights.lora_a, list):
        ranks = [0 if a is None else a.shape[0] for a in weights.lora_a]
        if len(ranks) != slices:
            # The layer splits some of these into several slices; which ones is its affair.
            ranks = [max(ranks)] * slices
    else:
        ranks = [weights.lora_a.shape[0]] * slices
    return np.array(ranks, dtype=np.int32)
