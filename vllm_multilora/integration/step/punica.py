"""The punica wrapper: vLLM's LoRA layers call it, it calls our kernels.

One wrapper serves a model (a multimodal model has one per tower as well). `for_layer` makes a
shallow copy per layer that shares the plans and index buffers and adds the layer's true ranks.
Layers that keep the shared wrapper, such as classification heads, are computed at the full
`max_lora_rank`: vLLM zeroes what an adapter does not fill, so that is correct, only slower.

On a GPU a step costs one asynchronous copy from pinned memory, whatever the model's layers read;
`OutputRows` names two exceptions. Nothing waits for the device. All buffers keep their addresses,
and a CUDA graph holds the kernels whatever batch it is captured with, so any graph replays with any
batch. They are omitted only from graphs that vLLM replays for adapter-free batches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA
from vllm.lora.layers.utils import LoRAMappingType

from multilora_kernels import BatchPlan, OutputFactors, PlanLayout, lora_shrink
from multilora_kernels.batch.staging import ALIGNMENT, StagingRing
from vllm_multilora.integration.step.mapping import BatchMapping
from vllm_multilora.integration.step.output_rows import OutputRows
from vllm_multilora.integration.step.punica_moe import ExpertLayers
from vllm_multilora.integration.step.punica_prepared import PreparedLayers
from vllm_multilora.integration.step.stock_rows import OUTPUT_LAYERS, StockRows

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping


class MultiLoRAPunicaWrapper(PreparedLayers, ExpertLayers):
    """Computes every adapter of a mixed batch with `multilora_kernels`.

    It has what vLLM's layers and manager ask of a `PunicaWrapperBase`, and nothing of that class:
    where a newer vLLM asks for more, that fails, instead of reading what no step has written.

    Attributes:
        stock_rows: What layers of vLLM's read of a step themselves.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        *,
        backend: str,
        lora_config: Any,
    ) -> None:
        self.device, self.backend = device, backend
        self.max_loras, self.max_batches = lora_config.max_loras, max_batches
        layout = PlanLayout(max_num_batched_tokens, self.max_loras, slot_runs=True)
        size = 2 * layout.size + 6 * max_num_batched_tokens + 5 * ALIGNMENT  # linear in slots
        self._ring = ring = StagingRing(torch.zeros(size, dtype=torch.int32, device=device))
        # In this order: a copy brings what lies between, too.
        self.stock_rows = StockRows(max_num_batched_tokens, self.max_loras, ring)
        self.plan = BatchPlan(layout, device, ring)
        self.output_rows = OutputRows(BatchPlan(layout, device, ring))
        self._embeddings_indices = self.stock_rows.embedding_offsets.buffer
        self._own_graphs = _have_own_graphs(get_current_vllm_config_or_none())
        self._lora_config = lora_config
        self._full_ranks = {}
        self.shrink_ranks = self.expand_ranks = self.factors = None
        self._slot_owners: list[int | None] = []
        self._slot_of = {0: -1}
        self._choices, self._prepared = {}, {}

    @property
    def token_lora_indices(self) -> torch.Tensor:
        """The slots of the step's rows, -1 for none, which vLLM 0.33's heads for tokens read."""
        return self.stock_rows.token_slots.rows

    def read_slot_runs(self) -> None:
        """Has steps bring what vLLM's own kernels read, too, for all layers of this wrapper."""
        self.plan.sends_slot_runs = True
        self.output_rows.read_slot_runs()

    def adopt_layers(self, layers: Iterable[BaseLayerWithLoRA]) -> None:
        """Learns which layers use this wrapper: steps prepare what they read, and no more."""
        layers = list(layers)
        self.stock_rows.adopt_layers(layers)
        self.output_rows.are_read = any(isinstance(layer, OUTPUT_LAYERS) for layer in layers)
        if experts := [layer for layer in layers if isinstance(layer, FusedMoEWithLoRA)]:
            self._pass_experts_to_stock(
                experts,
                self.plan.layout.max_tokens,
                self.max_batches,
                self.device,
                lora_config=self._lora_config,
            )

    def for_layer(
        self,
        shrink_ranks: torch.Tensor,
        expand_ranks: torch.Tensor,
        factors: OutputFactors | None = None,
    ) -> MultiLoRAPunicaWrapper:
        """This wrapper for one layer, whose true ranks it reads from the given tensors.

        Args:
            shrink_ranks: int32 [slices, slots], rows of lora_a that count; kept, not copied.
            expand_ranks: int32 [slices, slots], columns of lora_b that count. Differs from
                `shrink_ranks` only where tensor parallelism shards the rank dimension.
            factors: What adapters multiply the layer's outputs by; None: nothing.
        """
        own = copy.copy(self)
        own.shrink_ranks, own.expand_ranks, own.factors = shrink_ranks, expand_ranks, factors
        own._choices, own._prepared = {}, {}
        return own

    @torch.inference_mode()  # PyTorch changes what was made in a step in this mode only
    def memory_lost(self) -> None:
        """Makes what steps read on the device valid again after a sleep that kept no memory."""
        self.stock_rows.clear()
        self.plan.clear()
        self.output_rows.clear()
        for (_, rank), ranks in self._full_ranks.items():
            ranks.fill_(rank)

    def update_metadata(
        self,
        mapping: LoRAMapping | BatchMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Takes over a step's mapping of rows to adapters; once per step, not per layer."""
        if lora_index_to_id != self._slot_owners:  # as a rule they are those of the step before
            self._slot_owners = list(lora_index_to_id)
            own = {owner: slot for slot, owner in enumerate(lora_index_to_id) if owner}
            self._slot_of = {0: -1} | own
        slot_of = self._slot_of
        if isinstance(mapping, BatchMapping):
            ids = mapping.ids
            slots = np.fromiter(map(slot_of.__getitem__, ids.tolist()), np.int64, len(ids))
            token_slots = mapping.of_tokens(slots, -1)
            # In decoding every token is sampled: then one plan serves both.
            every_token = (
                mapping.base_rows is None and mapping.tokens.tobytes() == mapping.samples.tobytes()
            )
            sampler_slots = token_slots if every_token else slots.repeat(mapping.samples)
        else:
            token_slots = _slots_of(mapping.index_mapping, slot_of)
            sampler_slots = _slots_of(mapping.prompt_mapping, slot_of)
            if np.array_equal(token_slots, sampler_slots):
                sampler_slots = token_slots
        own_graphs = self._own_graphs and mapping.type is LoRAMappingType.LANGUAGE
        with self._ring.one_copy():
            self.plan.update(token_slots, own_graphs=own_graphs)
            self.output_rows.set_step(self.plan, token_slots, sampler_slots)
            self.stock_rows.update(token_slots, sampler_slots, vocab_size)
        self._update_experts(token_slots)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y += (x @ A.T) @ B.T`, each row with its own adapter; all slices at once.

        Then y is multiplied where the row's adapter does that.
        """
        if y.ndim != 2 or x.ndim != 2:  # a view takes as long as a small adapter's product
            y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        assert scale == 1.0, "slots have the scaled weights"
        self.linear(lora_a_stacked, lora_b_stacked, add_inputs=add_inputs)(y, x, self.plan)

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """`y[i] = x @ A_i.T`, finished for every row: layers that shard ranks gather y."""
        assert isinstance(y, torch.Tensor), "y must be one tensor [slices, tokens, ranks]"
        assert scale == 1.0, "slots have the scaled weights"
        self.shrink(lora_a_stacked)(y, x.reshape(-1, x.shape[-1]), self.plan)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y[:, offset_i:] += x[i] @ B_i.T`, from column `offset_start` on."""
        assert isinstance(x, torch.Tensor), "x must be one tensor [slices, tokens, ranks]"
        expand = self.expand(lora_b_stacked, offset_start, add_inputs=add_inputs)
        expand(y.view(-1, y.shape[-1]), x, self.plan)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y += x @ B.T`; x holds each token's row of the adapter's embedding."""
        self.expand(lora_b_stacked, add_inputs=add_inputs)(y, x.unsqueeze(0), self.plan)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """`y += (x @ A.T) @ B.T` over the rows that reach the logits."""
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        assert scale == 1.0, "slots have the scaled weights"
        logits = self.logits(lora_a_stacked, lora_b_stacked, y.size(-1))
        logits(y, x, self.output_rows.plan(x))

    def apply_lora_full_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        weight_stacked: torch.Tensor,
        bias_stacked: torch.Tensor,
        module_enabled: torch.Tensor,
    ) -> None:
        """Replaces y by `x @ W.T + bias` where the row's adapter brings a whole output head."""
        head = x.new_empty(1, x.size(0), weight_stacked.size(-2), dtype=torch.float32)
        lora_shrink(
            head,
            x,
            (weight_stacked,),
            self._ranks(None, 1, weight_stacked.size(-2)),
            self.output_rows.plan(x),
            backend=self.backend,
        )
        slots = self.stock_rows.sampler_slots.rows
        own = slots.clamp_min(0)
        replaces = (slots >= 0) & module_enabled[own]
        found = head[0].to(y.dtype) + bias_stacked[own].to(y.dtype)
        y.copy_(torch.where(replaces.unsqueeze(-1), found, y))


def _have_own_graphs(config: Any) -> bool:
    """Whether vLLM captures separate graphs for batches without adapters, and keeps them apart.

    Its model runners do for the language model, by default. Not told apart are a drafter's, which
    may share the embedding layer and is captured with a batch without adapters.
    """
    return (
        config is not None
        and config.compilation_config.cudagraph_specialize_lora
        and config.speculative_config is None
    )


def _slots_of(ids: Sequence[int], slot_of: dict[int, int]) -> npt.NDArray[np.int64]:
    """The slot of each entry of one of vLLM's tuples; 0 and less are requests without adapter."""
    distinct, position = np.unique(np.array(ids, dtype=np.int64), return_inverse=True)
    slots = np.array([slot_of[max(i, 0)] for i in distinct.tolist()], dtype=np.int64)
    return slots[position]
