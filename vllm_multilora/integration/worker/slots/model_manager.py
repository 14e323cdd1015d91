"""The model's side of the LoRA manager: its slots, and the true ranks of what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    FusedMoEWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.utils import LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.utils import replace_submodule

from multilora_kernels import SlotTable, host_memory
from multilora_kernels.trial.records import Record
from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.packing.pack_index import RankIndex
from vllm_multilora.integration.patching.activation import kernel_backend, settings_of
from vllm_multilora.integration.step.mapping import BatchMapping
from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper
from vllm_multilora.integration.step.punica_prepared import slices_of
from vllm_multilora.integration.step.short_forward import with_short_forward
from vllm_multilora.integration.step.staged_rows import SlotColumns
from vllm_multilora.integration.step.stock_kernels import restore_tables
from vllm_multilora.integration.step.stock_rows import ClassificationHead
from vllm_multilora.integration.worker.experts.expert_kernels import experts_left_alone
from vllm_multilora.integration.worker.experts.expert_slots import ExpertSlots
from vllm_multilora.integration.worker.experts.held_gates import adapt_held_gates
from vllm_multilora.integration.worker.kernel_choice.guarded_start import (
    StartSettings,
    choose_kernels,
)
from vllm_multilora.integration.worker.model.model_layout import is_ranked, running_layout
from vllm_multilora.integration.worker.model.output_factors import SlotFactors
from vllm_multilora.integration.worker.rows.encoder_rows import (
    ENCODER,
    encoder_rows,
    reads_encoder,
)
from vllm_multilora.integration.worker.slots.slot_buffers import (
    SlotRests,
    layer_bytes,
    wrapper_bytes,
)
from vllm_multilora.integration.worker.slots.warm_up import prepare, warm_up


@dataclass(frozen=True)
class _RankedLayer:
    """A layer that fills its own slots and whose true ranks are tracked.

    Attributes:
        rows: Its slices' rows in the rank tables.
        first_rank: The first rank of lora_a that this worker holds; not 0 only where tensor
            parallelism shards the rank dimension.
        held_ranks: How many ranks of lora_a this worker holds.
    """

    rows: slice
    first_rank: int
    held_ranks: int


class _Reordered:
    """Puts B's rows in the order in which vLLM has loaded those of the layers' own weights.

    All device memory is there from the start, as for the rest of filling a slot.
    """

    def __init__(self, slots: Sequence[torch.Tensor], orders: Mapping[int, torch.Tensor]) -> None:
        self._slots = {row: slots[row] for row in orders}
        nothing = torch.empty(1, 1, 0, 0)
        largest = max(self._slots.values(), key=torch.Tensor.numel, default=nothing)
        self._room = torch.empty_like(largest[0, 0])
        # Layers' orders are alike: each is on the device once.
        self._distinct: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._orders = {row: self._on_device(order) for row, order in orders.items()}

    def _on_device(self, order: torch.Tensor) -> torch.Tensor:
        for host, device in self._distinct:
            if torch.equal(host, order):
                return device
        self._distinct.append((order, order.to(self._room.device, copy=True)))
        return self._distinct[-1][1]

    @property
    def nbytes(self) -> int:
        return sum(order.nbytes for order, _ in self._distinct) + self._room.nbytes

    def memory_lost(self) -> None:
        """What was on the device is not there any more."""
        for host, device in self._distinct:
            device.copy_(host)

    def reorder(self, slot: int, rows: npt.NDArray[np.int32]) -> None:
        """Reorders a slot that has just been filled from a checkpoint, in these slices."""
        for row in rows.tolist() if self._orders else ():
            if (order := self._orders.get(row)) is not None:
                b, room = self._slots[row][slot, 0], self._room[: len(order)]
                b.copy_(torch.index_select(b, 0, order, out=room))


class MultiLoRAModelManager(LoRAModelManager):
    """Fills slots from host copies and tells every layer's wrapper the true ranks.

    Which adapter gets which slot is the worker manager's decision: vLLM's own methods for adding
    and activating adapters, inherited from the base class, are not used.

    Attributes:
        encoder_wrapper: Maps the encoder's rows in a model with encoder and decoder; None in
            other models, where encoders are towers, which have no adapters.
        layout: What the model accepts of an adapter.
        factors: What DoRA adapters multiply outputs by; None where they are not served.
        repeated_rows: As of `RunningLayout`.
        kernel_record: Which kernels serve which layers; None where nothing was chosen.
        keeps_row_maxima: Whether the largest logit of each sampled row is kept, for
            `take_row_maxima`.
        row_maxima: [rows, 1], those of the last step; None where there are none.
    """

    keeps_row_maxima = False
    row_maxima: torch.Tensor | None = None

    encoder_wrapper: MultiLoRAPunicaWrapper | None
    layout: ModelLayout
    factors: SlotFactors | None
    kernel_record: Record | None
    punica_wrapper_mapping: dict[str, MultiLoRAPunicaWrapper]  # type: ignore[assignment]

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        # VLLM's are the platform's, and an out-of-tree wrapper has no way in.
        of_model = _wrapper(self, vllm_config, max_num_batched_tokens)
        self.punica_wrapper_mapping = dict.fromkeys(self.punica_wrapper_mapping, of_model)
        self.encoder_wrapper = None
        self._experts_left_alone = dict(experts_left_alone(self.model))
        if vllm_config.model_config.is_encoder_decoder:
            self.encoder_wrapper = _wrapper(self, vllm_config, encoder_rows(vllm_config))
            self.punica_wrapper_mapping[ENCODER] = self.encoder_wrapper

    def _get_punica_wrapper(self, module_name: str) -> Any:
        if self.encoder_wrapper is not None and reads_encoder(module_name):
            return self.encoder_wrapper
        if module_name in self._experts_left_alone:
            return None
        return super()._get_punica_wrapper(module_name)

    def map_encoder(self, ids: npt.NDArray[np.integer], rows: npt.NDArray[np.integer]) -> None:
        """Maps the rows that the encoder computes in this step to adapters."""
        assert self.encoder_wrapper is not None, "a model without an encoder before its decoder"
        mapping = BatchMapping(ids, rows, None, LoRAMappingType.TOWER)
        slots = self.lora_slots + 1
        self.encoder_wrapper.update_metadata(mapping, self.lora_index_to_id, slots, self.vocab_size)

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        adapt_held_gates(self.model, self.modules)
        # Whichever way an adapter holds experts, the layers that they are in take it; this only
        # says so to vLLM once it has chosen these layers. Experts that share matrices do not.
        has_experts = any(isinstance(each, FusedMoEWithLoRA) for each in self.modules.values())
        shares = self.lora_config.enable_moe_shared_loras
        self._enable_mixed_moe_lora_format = has_experts and not shares
        self._expert_slots = ExpertSlots(self.modules)
        config = get_current_vllm_config()
        dora = settings_of(config).dora
        found = running_layout(self, dora=dora)
        self.layout, self._special = found.layout, found.special
        self.repeated_rows = found.repeated
        packed = list(found.packed.values())
        self._make_slots(packed, found.orders)
        layers = self._ranked_layers(packed)
        self._make_rank_tables([layer for layer, _ in layers])
        for shared in self._wrappers():
            shared.adopt_layers(m for m in self.modules.values() if m.punica_wrapper is shared)
        self.factors = SlotFactors(packed, self.lora_slots, self.device) if dora else None
        for number, (layer, own) in enumerate(layers):  # those of packed adapters first
            ranks = self._shrink_ranks[own], self._expand_ranks[own]
            factors = None
            if self.factors is not None and number < len(packed):
                factors = self.factors.of_layer(number)
            layer.set_mapping(layer.punica_wrapper.for_layer(*ranks, factors))
        dtype: Any = config.model_config.dtype
        wrapper = next(iter(self._wrappers()))
        kernels = StartSettings(
            settings_of(config).kernels, dtype, vllm_is_invariant=envs.VLLM_BATCH_INVARIANT
        )
        self.kernel_record = choose_kernels(self.modules, wrapper.backend, kernels)
        self._expert_slots.take_kernels(kernels.kernels, wrapper)
        self._rests = _slot_rests(layers)
        for layer, _ in layers:
            prepare(layer, dtype)
        if self.device.type == "cpu":
            self._shorten_forwards(layer for layer, _ in layers)
        else:
            parallel = config.parallel_config
            count = parallel.local_world_size
            share = {"workers": count, "worker": parallel.rank % count}
            warm_up(self.modules.values(), dtype, self.slot_table, **share)
        # Slots of special layers that hold something; the others need no clearing.
        self._filled: set[tuple[str, int]] = set()

    def _shorten_forwards(self, layers: Iterable[BaseLayerWithLoRA]) -> None:
        short = {id(layer): with_short_forward(layer) for layer in layers}
        for name, layer in self.modules.items():
            made = short.get(id(layer), layer)
            if made is not layer:  # logits processors are `lm_head` here, but not in the model
                self.modules[name] = made
                replace_submodule(self.model, name, made)

    def _make_slots(self, packed: Sequence[Any], orders: Mapping[int, torch.Tensor]) -> None:
        """Makes the slots of linear layers, and what copies packed adapters into them."""
        _store_by_column(packed, self.lora_config.lora_dtype, self.device)
        slots_of_a = [a for module in packed for a in module.lora_a_stacked]
        slots_of_b = [b for module in packed for b in module.lora_b_stacked]
        self.slot_table = SlotTable(slots_of_a, slots_of_b)
        self._reordered = _Reordered(slots_of_b, orders)

    def _ranked_layers(self, packed: Iterable[Any]) -> list[tuple[Any, slice]]:
        """The layers whose true ranks are tracked, each with its slices' rows in the rank tables.

        Those that packed adapters fill come first; `_ranked` gets the others.
        """
        layers: list[tuple[Any, slice]] = []
        rows = 0
        for module in packed:
            layers.append((module, slice(rows, rows + module.n_slices)))
            rows += module.n_slices
        self._ranked: dict[str, _RankedLayer] = {}
        for name, special in self._special.items():
            if is_ranked(special):
                slices = getattr(special, "n_slices", 1)
                shard = special.lora_a_stacked[0].shape[-2] if _shards_ranks(special) else 0
                self._ranked[name] = _RankedLayer(
                    slice(rows, rows + slices),
                    first_rank=special.tp_rank * shard if shard else 0,
                    held_ranks=shard or self.lora_config.max_lora_rank,
                )
                layers.append((special, self._ranked[name].rows))
                rows += slices
        return layers

    def _make_rank_tables(self, layers: Iterable[Any]) -> None:
        self._held_ranks = np.array(
            [a.shape[-2] for layer in layers for a in _stacked_a(layer)], dtype=np.int32
        )
        shape = (len(self._held_ranks), self.lora_slots)
        self._shrink_ranks = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._expand_ranks = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._rank_columns = SlotColumns((self._shrink_ranks, self._expand_ranks))

    def _wrappers(self) -> Iterable[Any]:  # of MultiLoRAPunicaWrapper
        """Each once, however many of the model's parts have it."""
        return {id(wrapper): wrapper for wrapper in self.punica_wrapper_mapping.values()}.values()

    @property
    def allocated_bytes(self) -> int:
        """Bytes on the device of all slots and of what the plugin keeps beside them."""
        tables = self._shrink_ranks.nbytes + self._expand_ranks.nbytes
        if self.device.type != "cpu":
            tables += self._rank_columns.nbytes + self.slot_table.staging_bytes
        if self.factors is not None:
            tables += self.factors.nbytes
        layers = sum(map(layer_bytes, self.modules.values()))
        return layers + tables + self._reordered.nbytes + sum(map(wrapper_bytes, self._wrappers()))

    @property
    def special_slot_bytes(self) -> int:
        """Bytes of one slot's weights in all layers that fill their slots themselves."""
        dtype: Any = self.lora_config.lora_dtype
        layers = self._special.values()
        return sum(layer_bytes(layer, dtype) for layer in layers) // self.lora_slots

    def give_slot(self, slot: int, lora_id: int | None) -> None:
        """From now on the slot is the adapter's, or nobody's; another that it had is nobody's."""
        owners = self.lora_index_to_id
        owners[:] = [None if owner == lora_id else owner for owner in owners]
        owners[slot] = lora_id

    def fill_rest(self, slot: int, index: RankIndex, special: LoRAModel | None) -> None:
        """All of filling a slot but the linear layers' weights, which `slot_table` copies.

        What the slot held before is not cleared where the true ranks, which are written here,
        keep the kernels from reading it. May run on any thread, as long as no step uses the slot;
        on a GPU it is queued on the thread's current stream.
        """
        expand = np.zeros(len(self._expand_ranks), dtype=np.int32)
        shrink = np.zeros(len(self._shrink_ranks), dtype=np.int32)
        expand[index.rows], shrink[index.rows] = index.ranks, index.a_ranks
        self._reordered.reorder(slot, index.rows)
        for name, module in self._special.items():
            weights = self._fill_special(slot, name, module, special)
            self._expert_slots.set_ranks(slot, name, weights, special)
            if weights is not None and (layer := self._ranked.get(name)):
                ranks = _true_ranks(weights, layer.rows.stop - layer.rows.start)
                expand[layer.rows] = ranks
                shrink[layer.rows] = np.clip(ranks - layer.first_rank, 0, layer.held_ranks)
        self._rests.clear(slot, shrink, expand)
        self._rank_columns.write(slot, shrink, expand)

    def _fill_special(
        self, slot: int, name: str, module: BaseLayerWithLoRA, special: LoRAModel | None
    ) -> LoRALayerWeights | None:
        weights = special.get_lora(name) if special else None
        if weights is None and name in self._ranked:
            return None  # rank 0: whatever lies there is not read
        head = None
        if isinstance(module, ClassificationHead) and special:
            head = special.get_module_to_save(name)
        if weights is None and head is None and (name, slot) not in self._filled:
            return None
        if isinstance(module, ClassificationHead):
            if head is None:
                module.reset_module_to_save(slot)
            else:
                module.set_module_to_save(slot, head.weight, head.bias)
        if weights is None:
            module.reset_lora(slot)
        else:
            module.set_lora(slot, weights.lora_a, weights.lora_b)
        if weights is None and head is None:
            self._filled.discard((name, slot))
        else:
            self._filled.add((name, slot))
        return weights

    def fill_with_dummy(self, slot: int, lora_id: int, rank: int) -> None:
        """Makes a slot look like an adapter of a rank in every layer; its weights stay."""
        ranks = np.full_like(self._held_ranks, rank)
        self._rank_columns.write(slot, np.minimum(ranks, self._held_ranks), ranks)
        self.lora_index_to_id[slot] = lora_id

    def empty_all_slots(self) -> None:
        """Nobody's slots, all of them."""
        self.lora_index_to_id[:] = [None] * self.lora_slots
        self._last_mapping = None
        self._last_slot_layout = None

    def _convert_3d_to_2d_moe_lora(self, lora_model: Any, module: Any, module_name: str) -> None:
        """Takes apart what an adapter holds of all experts of a layer.

        vLLM's takes the first half of what they make for gates, of experts without gates as well.
        """
        fused = lora_model.get_lora(f"{module_name}.base_layer")
        if fused is not None and not module.moe_config.is_act_and_mul:
            fused.lora_b = torch.cat([fused.lora_b, fused.lora_b])
        super()._convert_3d_to_2d_moe_lora(lora_model, module, module_name)

    @contextmanager
    def rows_to_embed(self, tokens: npt.NDArray[np.integer]) -> Iterator[None]:
        """Within it, a step's rows are those of tokens that the model embeds.

        Args:
            tokens: [requests], how many of each.
        """
        of_step: Any = self._last_mapping
        embedded: Any = BatchMapping(of_step.ids, tokens, of_step.samples, of_step.type)
        self.set_adapter_mapping(embedded)
        try:
            yield
        finally:
            self.set_adapter_mapping(of_step)

    @contextmanager
    def rows_from_prompt(self, first_token: int) -> Iterator[None]:
        """Within it, the rows of output layers are tokens of the step from that one on."""
        with ExitStack() as stack:
            for wrapper in self._wrappers():
                stack.enter_context(wrapper.output_rows.from_prompt(first_token))
            yield

    def take_row_maxima(self) -> torch.Tensor | None:
        """The largest logit of each row before it is sampled from, NaN if any of the row is.

        It is found sooner than NaN is counted among all tokens.
        """
        maxima, self.row_maxima = self.row_maxima, None
        return maxima

    def set_sampled_rows(self, counts: npt.NDArray[np.integer]) -> None:
        """Says how many rows of each request reach the output layers; see `OutputRows`."""
        for wrapper in self._wrappers():
            wrapper.output_rows.set_counts(counts)

    def forget_contents(self) -> None:
        """The slots' memory was lost: layers that fill their slots themselves clear them next.

        So may be all else that is kept on the device. Captured graphs read padding rows too, and
        must find valid numbers there.
        """
        self.empty_all_slots()
        for wrapper in self._wrappers():
            wrapper.memory_lost()
        self._shrink_ranks.zero_()
        self._expand_ranks.zero_()
        self._reordered.memory_lost()
        restore_tables()
        if self.factors is not None:
            self.factors.memory_lost()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # before slots are filled, on whichever stream
        self._filled = {(name, slot) for name in self._special for slot in range(self.lora_slots)}


def _wrapper(
    manager: LoRAModelManager, vllm_config: VllmConfig, max_rows: int
) -> MultiLoRAPunicaWrapper:
    return MultiLoRAPunicaWrapper(
        max_rows,
        manager.max_num_seqs,
        manager.device,
        backend=kernel_backend(vllm_config),
        lora_config=manager.lora_config,
    )


def _store_by_column(modules: Iterable[Any], dtype: Any, device: torch.device) -> None:
    """Allocates linear layers' slots anew, B's columns contiguous; on CPUs in huge pages.

    The columns of a low rank are then a few long pieces, where its rows would be pieces that are
    shorter than what memory delivers at a time. vLLM and the kernels address the slots through the
    layers' attributes; how they are stored is ours. vLLM's are freed first: there may be no room
    for both.
    """
    modules = list(modules)
    shapes = [
        [[tuple(a.shape) for a in m.lora_a_stacked], [tuple(b.mT.shape) for b in m.lora_b_stacked]]
        for m in modules
    ]
    for module in modules:
        module.lora_a_stacked = module.lora_b_stacked = ()
    all_shapes = [s for ab in shapes for part in ab for s in part]
    if device.type == "cpu":
        slots = iter(host_memory.zeros(all_shapes, dtype))
    else:
        slots = (torch.zeros(shape, dtype=dtype, device=device) for shape in all_shapes)
    for module, (a_shapes, b_shapes) in zip(modules, shapes, strict=True):
        module.lora_a_stacked = tuple(next(slots) for _ in a_shapes)
        module.lora_b_stacked = tuple(next(slots).mT for _ in b_shapes)


def _slot_rests(layers: Iterable[tuple[Any, slice]]) -> SlotRests:
    """What is cleared when a slot is filled: of layers whose kernels read past the true ranks."""
    slices: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
    for layer, own in layers:
        if layer.punica_wrapper.reads_rests:
            weights = zip(_stacked_a(layer), slices_of(layer.lora_b_stacked), strict=True)
            slices |= dict(enumerate(weights, own.start))
    return SlotRests(slices)


def _stacked_a(module: BaseLayerWithLoRA) -> Sequence[torch.Tensor]:
    """The slots' lora_a, one tensor for each of the layer's rows in the rank tables."""
    stacked = module.lora_a_stacked
    if isinstance(module, VocabParallelEmbeddingWithLoRA):  # [slots, vocabulary, ranks]
        return [stacked.transpose(-1, -2)]
    return [stacked] if isinstance(stacked, torch.Tensor) else list(stacked)


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
    else:
        ranks = [weights.lora_a.shape[0]] * slices
    return np.array(ranks, dtype=np.int32)
