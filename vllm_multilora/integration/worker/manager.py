"""The worker's LoRA manager: vLLM's interface to slots that the engine core controls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.lora.layers.utils import LoRAMappingType
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform

from vllm_multilora.errors import ConfigError, MultiLoRAError
from vllm_multilora.integration import kv_blocks
from vllm_multilora.integration.cpu_compilation import compile_only_with_compiler
from vllm_multilora.integration.failed_requests import not_by_workers
from vllm_multilora.integration.logs import join_vllm_logging
from vllm_multilora.integration.patching.activation import loads_adapters, settings_of
from vllm_multilora.integration.settings.cache_settings import cpu_budget
from vllm_multilora.integration.settings.flags import checks_in
from vllm_multilora.integration.step.mapping import BatchMapping, base_rows_of
from vllm_multilora.integration.step.output_rows import with_known_rows
from vllm_multilora.integration.worker.experts.expert_kernels import choose_expert_kernels
from vllm_multilora.integration.worker.pushed_tensors import PushedTensors, tensors_in, tensors_of
from vllm_multilora.integration.worker.slots.filler import SlotFiller
from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager
from vllm_multilora.integration.worker.slots.slot_buffers import report_slots
from vllm_multilora.integration.worker.slots.special import SpecialParts
from vllm_multilora.integration.worker_link.fill_link import (
    Missing,
    WorkerLink,
    attach_worker,
)
from vllm_multilora.integration.worker_link.orders import Order, Swap
from vllm_multilora.integration.worker_link.remote_link import LinkAddress, dial
from vllm_multilora.slots.budget import CpuBudget

logger = logging.getLogger(__name__)

_WARM_UP_PATH = "/not/a/real/path"

is_used = False
"""Whether a manager of this process is ours, for functions of vLLM's that know none."""

_LOADER = "_load_adapter"
"""Method of vLLM's manager that frameworks replace, to load adapters from elsewhere."""


class MultiLoRAWorkerManager(LRUCacheWorkerLoRAManager):
    """Has the adapters of each step in the slots that the engine core has given them.

    Nothing is decided here. Orders to fill slots come between steps and are carried out beside
    them; a step's adapters are in their slots when it begins.

    vLLM's warm-up adapters occupy slots while vLLM profiles or captures graphs, before the engine
    core disposes of them, and vanish afterwards.

    Attributes:
        filler: Carries out orders.
        pushed: Adapters that this worker was given as tensors.
        largest_adapter: Bytes of an adapter of the largest rank in every module, on this worker.
        sampled_rows: [requests], how many rows of each request the last batch sampled.
        idle_generators: Of requests with a seed, by row, that are not used in this step.
    """

    _manager_cls = MultiLoRAModelManager  # type: ignore[assignment]
    _adapter_manager: MultiLoRAModelManager
    sampled_rows: npt.NDArray[np.integer]
    idle_generators: dict[int, torch.Generator]

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        """Wraps the model's layers and connects to the engine core; returns the model to run."""
        choose_expert_kernels(model)
        if current_platform.is_cpu():
            compile_only_with_compiler(vllm_config.model_config)
        wrapped = super().create_lora_manager(model, vllm_config)
        manager = self._adapter_manager
        self._vllm_config = vllm_config
        self.idle_generators = {}
        special = SpecialParts(manager, self.max_position_embeddings)
        parallel = vllm_config.parallel_config
        is_alone = parallel.distributed_executor_backend == "external_launcher"
        link = attach_worker(0 if is_alone else self.rank)
        self.filler = SlotFiller(manager, special, link)
        is_first = not parallel.rank % parallel.local_world_size
        self.pushed = PushedTensors(writes=is_alone or is_first)
        self.largest_adapter = manager.layout.largest_bytes() + manager.special_slot_bytes
        report_slots(manager, self._budget(), vllm_config)
        self._step: Mapping[int, LoRARequest] = {}
        self._orders = 0  # since the start; with the last step's count of them
        self._step_orders = 0
        self._missing: frozenset[int] = frozenset()
        self._warm_up_ranks: dict[int, int] = {}
        self._is_warming_up = False
        self._owners: list[int | None] | None = None  # of the slots, as a warm-up has found them
        return with_known_rows(wrapped)

    def _budget(self) -> CpuBudget:
        workers = self._vllm_config.parallel_config.local_world_size
        settings = settings_of(self._vllm_config)
        largest = self.largest_adapter * workers
        return cpu_budget(settings, self._vllm_config, largest_adapter=largest)

    @property
    def model_manager(self) -> MultiLoRAModelManager:
        return self._adapter_manager

    # Batches

    def activate_batch(
        self,
        input_batch: Any,
        num_scheduled_tokens: npt.NDArray[np.integer],
        num_sampled_tokens: npt.NDArray[np.integer] | None,
        mapping_type: LoRAMappingType,
        base_rows: npt.NDArray[np.integer] | None,
    ) -> None:
        """Puts a batch's adapters into slots and tells the kernels which rows are whose.

        Takes the place of the mixin's `set_active_loras`, without its tuples per token.

        Args:
            input_batch: The model runner's batch.
            num_scheduled_tokens: [requests], tokens each request has in this step.
            num_sampled_tokens: [requests], rows of each request that reach the logits; None
                for one each.
            mapping_type: vLLM's mapping type.
            base_rows: As of `BatchMapping`.
        """
        self._place(input_batch.lora_id_to_lora_request)
        ids = self._without_missing(input_batch.request_lora_mapping[: input_batch.num_reqs])
        mapping: Any = BatchMapping(
            ids, num_scheduled_tokens, num_sampled_tokens, mapping_type, base_rows
        )
        if mapping_type is LoRAMappingType.LANGUAGE:
            self.sampled_rows = mapping.samples
        self._adapter_manager.keeps_row_maxima = True  # this is the first model runner
        self._adapter_manager.set_adapter_mapping(mapping)

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any | None) -> None:
        """As `activate_batch`, from vLLM's description of a batch, or `BatchLoraState`'s."""
        # Sets of requests have another order on every rank, and ranks must decide alike.
        ordered = sorted((r for r in requests if r), key=lambda request: request.lora_int_id)
        self._place({request.lora_int_id: request for request in ordered})
        own = mapping.index_mapping[0] if mapping is not None and mapping.index_mapping else None
        if isinstance(own, BatchMapping):
            own.ids = self._without_missing(own.ids)
            self._adapter_manager.set_adapter_mapping(own)  # type: ignore[arg-type]
            if own.encoder_items is not None:
                self.map_encoder(*own.encoder_items)
            return
        if self._missing and mapping is not None:
            mapping = replace(
                mapping,
                index_mapping=tuple(self._without_missing(np.array(mapping.index_mapping))),
                prompt_mapping=tuple(self._without_missing(np.array(mapping.prompt_mapping))),
            )
        if mapping is not None:
            self._adapter_manager.set_adapter_mapping(mapping)

    @property
    def has_encoder(self) -> bool:
        """Whether the model has an encoder in front of its decoder, whose rows are mapped too."""
        return self._adapter_manager.encoder_wrapper is not None

    def map_encoder(self, ids: npt.NDArray[np.integer], rows: npt.NDArray[np.int64]) -> None:
        """Maps the encoder's rows of a step whose adapters are in their slots already.

        Args:
            ids: int64 [items], the adapter of each item's request; 0 for none.
            rows: int64 [items], how many rows each item has.
        """
        if len(ids):
            self._adapter_manager.map_encoder(self._without_missing(ids), rows)

    def _without_missing(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """Adapters of rows, 0 where the row's adapter is in no slot."""
        return np.where(np.isin(ids, list(self._missing)), 0, ids) if self._missing else ids

    def _place(self, step: Mapping[int, LoRARequest]) -> None:
        """Looks for every adapter of a step in the slots.

        One that is in none has no business in the step: its rows are computed without it, the
        engine core is told and throws their tokens away, and the other rows never notice.
        """
        if self._is_warming_up and all(
            request.lora_path == _WARM_UP_PATH for request in step.values()
        ):
            if step:  # graphs are captured without adapters as well
                self._place_warm_up(step)
            return
        self._end_warm_up()
        # Nothing to look at, in nearly all steps: the same requests' adapters as before.
        if (
            len(step) == len(self._step)
            and all(map(is_, step.values(), self._step.values()))
            and self._orders == self._step_orders
            and not self._missing
        ):
            return
        slot_of = {owner: slot for slot, owner in enumerate(self._adapter_manager.lora_index_to_id)}
        slots = [slot_of[i] for i in sorted(step) if i in slot_of]  # ranks must do alike
        self.filler.await_slots(slots)
        if self._adapter_manager.factors is not None:
            self._adapter_manager.factors.finish(slots)
        self._missing = frozenset(step.keys() - slot_of.keys())
        self._step, self._step_orders = dict(step), self._orders
        if (link := self.filler.link) is not None:
            for lora_id in sorted(self._missing):
                link.tell(Missing(lora_id))
        elif self._missing:
            raise MultiLoRAError(
                "requests came with adapters that no engine core has ordered into slots: the "
                "engine's executor was not made by vllm-multilora. Start the engine with the "
                "class that vLLM's Executor.get_class returns, or with --no-multilora"
            )

    # Orders

    @property
    def rank(self) -> int:
        """Which worker of its engine this is."""
        return self._vllm_config.parallel_config.rank

    def reach_engine_core(self, address: LinkAddress) -> bool:
        """Connects to an engine core on another machine; whether anything was to be done.

        Raises:
            OSError: It cannot be reached.
        """
        if self.filler.link is not None:
            return False
        self.filler.link = WorkerLink(dial(address, "fills", self.rank))
        return True

    def begin(self, order: Order) -> None:
        self._end_warm_up()
        self._orders += 1
        if isinstance(order, Swap):
            self._adapter_manager.give_slot(order.slot, order.request.lora_int_id)
        else:
            self.filler.begin(order)

    # What vLLM calls besides

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Takes in an adapter that comes as tensors, or that another program loads in this worker.

        The engine core registers it when the call that brought it has returned.

        Raises:
            MultiLoRAError: It is in a folder: that is the engine core's to load.
        """
        found = tensors_in(lora_request)
        if found is None:
            load = getattr(self, _LOADER)
            if _is_vllms(load):
                raise not_by_workers("add")
            found = tensors_of(load(lora_request))
        self.pushed.add(lora_request, *found)
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets an adapter that this worker was given as tensors; whether it was."""
        return self.pushed.remove(adapter_id)

    def remove_all_adapters(self) -> None:
        """Ends a warm-up or, outside of one, comes with new base weights; adapters stay."""
        if self._is_warming_up:
            self._end_warm_up()
        elif self._adapter_manager.factors is not None:
            self.filler.await_all()
            self._adapter_manager.factors.weights_changed()
            self._step_orders = -1  # the next step looks at all of its slots

    def slots_lost(self) -> None:
        self.filler.await_all()
        self._adapter_manager.forget_contents()
        self.filler.slots_back()
        self._orders += 1

    # Warm-up

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        """Announces a warm-up adapter of a rank: until `remove_all_adapters`, slots are theirs."""
        self._is_warming_up = True
        self._warm_up_ranks[lora_request.lora_int_id] = rank
        return True

    def _place_warm_up(self, step: Mapping[int, LoRARequest]) -> None:
        manager = self._adapter_manager
        if self._owners is None:
            self._owners = list(manager.lora_index_to_id)
        manager.empty_all_slots()
        if not self._orders:
            for slot, lora_id in enumerate(sorted(step)):
                manager.fill_with_dummy(slot, lora_id, self._warm_up_ranks[lora_id])
            return
        # An idle rank's dummy batch, of one request with the first of these, while its engine
        # serves: what is in the slots stays, and no rank waits for what is copied into others.
        slots = sorted(range(manager.lora_slots), key=self.filler.is_filling)
        self.filler.await_slots(slots[:1])
        for slot, lora_id in zip(slots, sorted(step), strict=False):
            manager.lora_index_to_id[slot] = lora_id

    def _end_warm_up(self) -> None:
        if not self._is_warming_up:
            return
        self._warm_up_ranks.clear()
        self._is_warming_up = False
        if self._owners is not None:  # it had adapters
            self._adapter_manager.lora_index_to_id[:] = self._owners
            self._owners = None


def make_worker_manager(
    original: type, vllm_config: VllmConfig, *args: Any, **kwargs: Any
) -> LRUCacheWorkerLoRAManager:
    join_vllm_logging()
    if not loads_adapters(vllm_config):
        return original(vllm_config, *args, **kwargs)
    if (loader := _others_loader(original)) is not None:
        if checks := checks_in(settings_of(vllm_config)):
            raise ConfigError(
                f"{checks} would check no adapter here, because {loader} loads them in vLLM's "
                f"place: leave one or the other out"
            )
        logger.warning(
            "%s loads adapters in vLLM's place: vllm-multilora leaves them to it here, and to "
            "vLLM's own manager and kernels.",
            loader,
        )
        return original(vllm_config, *args, **kwargs)
    if settings_of(vllm_config).quarantine:
        kv_blocks.start()
    global is_used
    is_used = True
    return MultiLoRAWorkerManager(vllm_config, *args, **kwargs)


def _others_loader(manager: type) -> str | None:
    """What has taken the place of vLLM's manager or of its calls for a step; None: nothing.

    One that only loads adapters in another way is not meant: ours calls it (`add_adapter`).
    """
    for name in ("add_adapter", "_apply_adapters"):
        method = getattr(manager, name, None)
        if not _is_vllms(method):
            return f"{method.__module__}.{getattr(method, '__qualname__', name)}"
    return None


def _is_vllms(method: Any) -> bool:
    return (getattr(method, "__module__", None) or "vllm").partition(".")[0] == "vllm"


def manager_of(model_runner: Any) -> MultiLoRAWorkerManager | None:
    """The manager of a model runner's adapters; None where it is stock's, or LoRA is off."""
    manager = getattr(model_runner, "lora_manager", None)
    return manager if isinstance(manager, MultiLoRAWorkerManager) else None


def set_active_loras(
    original: Callable[..., None],
    runner: Any,
    input_batch: Any,
    num_scheduled_tokens: Any,
    num_sampled_tokens: Any = None,
    mapping_type: Any = LoRAMappingType.LANGUAGE,
) -> None:
    manager = manager_of(runner)
    if manager is None:
        original(runner, input_batch, num_scheduled_tokens, num_sampled_tokens, mapping_type)
        return
    manager.activate_batch(
        input_batch,
        num_scheduled_tokens,
        num_sampled_tokens,
        mapping_type,
        base_rows_of(runner.requests, input_batch, num_scheduled_tokens),
    )
    if runner.device.type == "cpu" and input_batch.generators:
        is_amidst = runner.discard_request_mask.np
        manager.idle_generators.update(_taken(input_batch.generators, is_amidst))


def _taken(
    generators: dict[int, torch.Generator], rows: npt.NDArray[np.bool_]
) -> dict[int, torch.Generator]:
    """Takes the generators of requests amidst their prompts out of the batch, by row.

    vLLM draws tokens with them, which it throws away, and then turns them back, which generators of
    CPUs do not allow.
    """
    return {row: generators.pop(row) for row in list(generators) if rows[row]}
