"""The worker's LoRA manager: vLLM's interface over the three-tier adapter cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import is_
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.lora.layers.utils import LoRAMappingType
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_multilora.cache import (
    AdapterCache,
)
from vllm_multilora.cache.readiness_log import attach_writer
from vllm_multilora.cache.shared_log import LogWriter, SharedLogError
from vllm_multilora.cache.shared_segment import SharedSegmentError
from vllm_multilora.integration.activation import settings_of
from vllm_multilora.integration.adapter_gate import LOG_PATH_VARIABLE
from vllm_multilora.integration.adapter_tiers import AdapterTiers
from vllm_multilora.integration.cache_settings import cpu_budget
from vllm_multilora.integration.host_adapter import HostAdapterLoader
from vllm_multilora.integration.mapping import BatchMapping
from vllm_multilora.integration.metrics import worker_recorder
from vllm_multilora.integration.model_manager import MultiLoRAModelManager
from vllm_multilora.integration.start_report import report_slots

logger = logging.getLogger(__name__)

_WARM_UP_PATH = "/not/a/real/path"


class MultiLoRAWorkerManager(LRUCacheWorkerLoRAManager):
    """Keeps adapters on disk, in host memory and in slots, as `AdapterCache` decides.

    Adding an adapter reads and checks it and keeps it in host memory if there is room; only a
    batch that uses it gives it a slot. Every worker of a tensor-parallel group gets the same calls
    and therefore decides alike.

    vLLM's warm-up adapters are no adapters of the cache: they occupy slots while vLLM profiles or
    captures graphs, and vanish afterwards without having cost anybody their place in host memory.
    """

    _manager_cls = MultiLoRAModelManager  # type: ignore[assignment]
    _adapter_manager: MultiLoRAModelManager

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        """Wraps the model's layers and sets up the cache; returns the model."""
        wrapped = super().create_lora_manager(model, vllm_config)
        manager = self._adapter_manager
        settings = settings_of(vllm_config)
        budget = cpu_budget(
            settings,
            vllm_config,
            largest_adapter=manager.layout.largest_bytes() + manager.special_slot_bytes,
        )
        report_slots(manager, budget, vllm_config)
        new_cache = partial(
            AdapterCache, slots=manager.lora_slots, budget=budget, policy=settings.cache_policy
        )
        reader = HostAdapterLoader(
            manager, self.max_position_embeddings, self._lora_model_cls, settings
        )
        self.tiers = AdapterTiers(
            manager,
            reader,
            new_cache,
            settings,
            _attach_to_log(vllm_config),
            worker_recorder(vllm_config),
        )
        self._step: Mapping[int, LoRARequest] = {}
        self._removals = 0
        self._failed: frozenset[int] = frozenset()
        self._warm_up_ranks: dict[int, int] = {}
        self._is_warming_up = False
        return wrapped

    @property
    def model_manager(self) -> MultiLoRAModelManager:
        """The model's side: its slots and layers."""
        return self._adapter_manager

    # Batches

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
        self._place(input_batch.lora_id_to_lora_request)
        ids = self._without_failed(input_batch.request_lora_mapping[: input_batch.num_reqs])
        mapping: Any = BatchMapping(ids, num_scheduled_tokens, num_sampled_tokens, mapping_type)
        self._adapter_manager.set_adapter_mapping(mapping)

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """As `activate_batch`, from vLLM's own description of a batch."""
        # Sets of requests have another order on every rank, and ranks must decide alike.
        ordered = sorted((r for r in requests if r), key=lambda request: request.lora_int_id)
        self._place({request.lora_int_id: request for request in ordered})
        if self._failed and isinstance(mapping, BatchMapping):
            mapping = BatchMapping(
                self._without_failed(mapping.ids), mapping.tokens, mapping.samples, mapping.type
            )
        elif self._failed and mapping is not None:
            mapping = replace(
                mapping,
                index_mapping=tuple(self._without_failed(np.array(mapping.index_mapping))),
                prompt_mapping=tuple(self._without_failed(np.array(mapping.prompt_mapping))),
            )
        if mapping is not None:
            self._adapter_manager.set_adapter_mapping(mapping)

    def _without_failed(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """Adapters of rows, 0 where the row's adapter could not be had."""
        return np.where(np.isin(ids, list(self._failed)), 0, ids) if self._failed else ids

    def _place(self, step: Mapping[int, LoRARequest]) -> None:
        """Sees to it that every adapter of a step has a slot."""
        if self._is_warming_up and self._is_warm_up(step.values()):
            if step:  # graphs are captured without adapters as well
                self._place_warm_up(step)
            return
        if self._is_warming_up:
            self._end_warm_up()
        # Nothing to look at, in nearly all steps: the same requests' adapters as before.
        if (
            len(step) != len(self._step)
            or not all(map(is_, step.values(), self._step.values()))
            or self._failed
            or self._removals != self.tiers.removals
        ):
            self._failed = self.tiers.load_for(step)
            self._step, self._removals = dict(step), self.tiers.removals
        self.tiers.place(step.keys() - self._failed)

    # Adapters

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Reads and checks an adapter, while everybody waits; see `AdapterTiers.add`."""
        self.tiers.add(lora_request)
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets an adapter and frees its slot and memory; False if it is not known."""
        return self.tiers.remove(adapter_id)

    def remove_all_adapters(self) -> None:
        """Ends a warm-up; outside of one, forgets all adapters (the base weights are new)."""
        if self._is_warming_up:
            self._end_warm_up()
            return
        self.tiers.remove_all()

    def pin_adapter(self, adapter_id: int) -> bool:
        """Keeps an adapter in memory and in its slot; see `AdapterTiers.pin`."""
        self.tiers.pin(adapter_id, self._step)
        return True

    def list_adapters(self) -> set[int]:
        """The adapters that are in host memory or in slots."""
        return set(self.tiers.cache.cpu_adapters)

    def slots_lost(self) -> None:
        """The slots' memory did not survive (sleep mode): adapters are copied there again."""
        self.tiers.slots_lost()

    # Warm-up

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """A warm-up begins: until `remove_all_adapters`, slots belong to its adapters."""
        self._is_warming_up = True
        yield

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        """Announces a warm-up adapter of a rank."""
        self._warm_up_ranks[lora_request.lora_int_id] = rank
        return True

    def _is_warm_up(self, requests: Iterable[LoRARequest]) -> bool:
        return all(request.lora_path == _WARM_UP_PATH for request in requests)

    def _place_warm_up(self, step: Mapping[int, LoRARequest]) -> None:
        self.slots_lost()
        for slot, lora_id in enumerate(sorted(step)):
            self._adapter_manager.fill_with_dummy(slot, lora_id, self._warm_up_ranks[lora_id])

    def _end_warm_up(self) -> None:
        self._warm_up_ranks.clear()
        self._is_warming_up = False
        self._adapter_manager.empty_all_slots()
        for slot, lora_id in enumerate(self.tiers.cache.slots):
            self._adapter_manager.lora_index_to_id[slot] = lora_id


def _attach_to_log(vllm_config: VllmConfig) -> LogWriter | None:
    """This worker's end of the engine core's readiness log; None if there is no such log."""
    path = os.environ.get(LOG_PATH_VARIABLE)
    if not path:
        return None
    try:
        return attach_writer(Path(path), vllm_config.parallel_config.rank)
    except (SharedLogError, SharedSegmentError) as error:
        logger.warning("This worker cannot tell which adapters it has ready: %s", error)
        return None
