"""The worker's LoRA manager: vLLM's interface over the three-tier adapter cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from operator import is_
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.layers.utils import LoRAMappingType
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_multilora.cache import (
    AdapterCache,
    AdapterState,
    CacheFullError,
    PinLimitError,
    SlotsExhaustedError,
)
from vllm_multilora.cache.load_failures import (
    FailureKind,
    LoadFailedError,
    LoadFailure,
    classify_failure,
)
from vllm_multilora.cache.load_queue import LoadReport
from vllm_multilora.cache.loader import BackgroundLoader
from vllm_multilora.cache.readiness_events import Event, Failed, Lost, Ready
from vllm_multilora.cache.readiness_log import attach_writer
from vllm_multilora.cache.shared_log import LogWriter, SharedLogError
from vllm_multilora.cache.shared_segment import SharedSegmentError
from vllm_multilora.integration.activation import settings_of
from vllm_multilora.integration.adapter_gate import LOG_PATH_VARIABLE, LOST_IN_STEP
from vllm_multilora.integration.cache_settings import cpu_budget
from vllm_multilora.integration.host_adapter import HostAdapter, HostAdapterLoader
from vllm_multilora.integration.mapping import BatchMapping
from vllm_multilora.integration.model_manager import MultiLoRAModelManager

logger = logging.getLogger(__name__)

_WARM_UP_PATH = "/not/a/real/path"

RETRY_DELAY_S = 2.0
"""How long a failed load answers for further requests: a broken adapter must not wear the disk."""


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
        self._new_cache = partial(
            AdapterCache, slots=manager.lora_slots, budget=budget, policy=settings.cache_policy
        )
        self._cache = self._new_cache()
        self._pinned_names = frozenset(settings.pin)
        self._reader = HostAdapterLoader(
            manager, self.max_position_embeddings, self._lora_model_cls, settings
        )
        self._load_timeout_s = settings.load_timeout_s
        self._loader: BackgroundLoader[LoRARequest, HostAdapter] = BackgroundLoader(
            self._reader.load,
            threads=settings.loader_threads,
            # What one batch can need: enough to fill all slots, a bound on memory beyond the tier.
            staged_limit=max(manager.lora_slots, settings.loader_threads),
            timeout_s=settings.load_timeout_s,
            retry_delay_s=RETRY_DELAY_S,
            on_done=self._report,
            classify=_classify,
        )
        self._log = _attach_to_log(vllm_config)
        # Written by the main thread, read by the loader's: the newest question about an adapter.
        self._serials: dict[int, int] = {}
        self._failed: frozenset[int] = frozenset()
        self._host: dict[int, HostAdapter] = {}
        self._requests: dict[int, LoRARequest] = {}
        self._step: Mapping[int, LoRARequest] = {}
        self._held: set[int] = set()
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
        if len(step) != len(self._step) or not all(map(is_, step.values(), self._step.values())):
            self._failed = self._load_missing(step)
            # A step without all of its adapters is looked at anew next time.
            self._step = {} if self._failed else dict(step)
        for activation in self._cache.begin_step(step.keys() - self._failed):
            with gpu_sync_allowed():
                self._adapter_manager.fill_slot(
                    activation.slot, activation.adapter_id, self._host[activation.adapter_id]
                )
        for lora_id in self._held & step.keys():
            self._release(lora_id)

    def _load_missing(self, step: Mapping[int, LoRARequest]) -> frozenset[int]:
        """Takes a step's adapters into host memory: staged ones as a rule, else by loading now.

        Returns:
            Adapters that cannot be had. Their rows are computed without adapter, and the engine
            throws the result away; the other rows of the step never notice.
        """
        for request in step.values():
            if request.load_inplace and self._requests.get(request.lora_int_id) is not request:
                self._reload_if_changed(request)
            self._note(request)
        failed = set()
        for lora_id in self._cache.protect_step(step.keys()):
            failure = self._load_now(step[lora_id])
            if failure is not None:
                if self._log is None:
                    raise LoadFailedError(lora_id, failure)
                self._log.append(Failed(lora_id, LOST_IN_STEP, failure))
                failed.add(lora_id)
        return frozenset(failed)

    def _load_now(self, request: LoRARequest) -> LoadFailure | None:
        """Gets an adapter into host memory, staged or not, evicting others if need be."""
        lora_id = request.lora_int_id
        try:
            with gpu_sync_allowed():
                adapter = self._loader.take(lora_id) or self._loader.wait(
                    lora_id, request, timeout_s=self._load_timeout_s
                )
            self._admit(lora_id, adapter, evict=True)
        except LoadFailedError as error:
            return error.failure
        except CacheFullError as error:
            return LoadFailure(FailureKind.NO_MEMORY, str(error))
        return None

    def _admit(self, lora_id: int, adapter: HostAdapter, *, evict: bool) -> bool:
        """Takes an adapter that was read into the CPU tier; whether there was room."""
        self._cache.start_loading(lora_id)
        admission = self._cache.finish_loading(lora_id, adapter.nbytes, evict=evict)
        for victim in admission.evicted:
            self._drop(victim)
        if admission.admitted:
            self._host[lora_id] = adapter
        return admission.admitted

    def _reload_if_changed(self, request: LoRARequest) -> None:
        """Drops an adapter that was loaded from files that have changed since.

        vLLM reloads for every step of a request that has `load_inplace` set. Once for each
        request, and only where there is something new, is what it can mean.
        """
        loaded = self._host.get(request.lora_int_id)
        if loaded is not None and self._reader.has_changed(request, loaded):
            self._forget(request.lora_int_id)

    # What the engine core asks for; see `adapter_gate`

    def prefetch(self, request: LoRARequest, serial: int) -> None:
        """Starts to load an adapter on a background thread, if it is not in host memory.

        The answer goes to the readiness log, under the serial number.
        """
        lora_id = request.lora_int_id
        self._note(request)
        self._serials[lora_id] = serial
        if lora_id in self._host and not request.load_inplace:
            self._say(Ready(lora_id, serial))
            return
        if request.load_inplace:
            self._loader.forget(lora_id)  # what was read before is not what is asked for
        self._loader.want(lora_id, request)

    def ensure(self, request: LoRARequest) -> LoadFailure | None:
        """Loads an adapter now and keeps it until a step has used it; returns why it cannot be."""
        lora_id = request.lora_int_id
        self._note(request)
        if lora_id not in self._host and (failure := self._load_now(request)):
            return failure
        if lora_id not in self._held:
            self._cache.hold(lora_id)
            self._held.add(lora_id)
        return None

    def keep_staged(self, lora_id: int) -> None:
        """Takes a registered adapter into host memory if there is free room; else it stays on disk.

        One that is there already is replaced, between two steps: it was read anew.
        """
        adapter = self._loader.take(lora_id)
        request = self._requests.get(lora_id)
        if adapter is not None and request is not None:
            if lora_id in self._host:
                self._forget(lora_id)
                self._note(request)
            if not self._admit(lora_id, adapter, evict=False):
                self._say(Lost(lora_id))
        self._release(lora_id)

    def drop_staged(self, lora_id: int) -> None:
        """Nobody waits for the adapter any more."""
        self._loader.drop(lora_id)
        self._release(lora_id)
        if lora_id in self._requests and lora_id not in (*self._host, *self._cache.pinned):
            self._forget(lora_id)  # on disk only: whoever wants it names it again

    def problems(self, lora_id: int) -> list[dict[str, Any]]:
        """All that was wrong with an adapter's files when they were read last."""
        return self._reader.problems(lora_id)

    def _release(self, lora_id: int) -> None:
        if lora_id in self._held:
            self._held.discard(lora_id)
            self._cache.release(lora_id)

    def _report(self, lora_id: int, report: LoadReport[LoRARequest]) -> None:
        """A load has ended; called on the loader's threads."""
        serial = self._serials.get(lora_id)
        if serial is None:
            return
        if report.failure is None:
            self._say(Ready(lora_id, serial))
        else:
            self._say(Failed(lora_id, serial, report.failure))

    def _say(self, event: Event) -> None:
        if self._log is not None:
            self._log.append(event)

    # Adapters

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Reads and checks an adapter; keeps it in host memory if there is free room.

        The engine core does this in the background; here everybody waits.

        Returns:
            True: the adapter is known and its files are good.

        Raises:
            LoadFailedError: The adapter cannot be served.
        """
        lora_id = lora_request.lora_int_id
        is_new = self._cache.state(lora_id) is AdapterState.GONE
        if lora_id not in self._host or lora_request.load_inplace:
            self._note(lora_request)
            self._loader.forget(lora_id)
            self._loader.want(lora_id, lora_request)
            try:
                adapter = self._loader.wait(lora_id, lora_request, timeout_s=self._load_timeout_s)
            except LoadFailedError:
                if is_new:
                    self._forget(lora_id)
                raise
            if lora_id in self._host:
                self._forget(lora_id)
                self._note(lora_request)
            self._admit(lora_id, adapter, evict=False)
        return True

    def _note(self, request: LoRARequest) -> None:
        """Makes an adapter known; another one under its number takes its place."""
        lora_id = request.lora_int_id
        known = self._requests.get(lora_id)
        if known is not None and known.lora_path != request.lora_path:
            self._forget(lora_id)
        self._requests[lora_id] = request
        self._cache.register(lora_id)
        if request.lora_name in self._pinned_names and lora_id not in self._cache.pinned:
            try:
                self._cache.pin(lora_id)
            except PinLimitError as error:
                logger.warning("%s", error)

    def _drop(self, lora_id: int) -> None:
        """Lets go of a host copy, and of the slot if the adapter had one."""
        del self._host[lora_id]
        self._say(Lost(lora_id))
        slots = self._adapter_manager.lora_index_to_id
        if lora_id in slots:
            self._adapter_manager.empty_slot(slots.index(lora_id))

    def _forget(self, lora_id: int) -> None:
        """Removes an adapter from everywhere; a step that still needs it reads it again."""
        self._cache.end_step()
        self._step = {}
        self._release(lora_id)
        slot = self._cache.remove(lora_id)
        if slot is not None:
            self._adapter_manager.empty_slot(slot)
        if self._host.pop(lora_id, None) is not None:
            self._say(Lost(lora_id))
        self._loader.drop(lora_id)
        self._requests.pop(lora_id, None)

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets an adapter and frees its slot and memory; False if it is not known."""
        if self._cache.state(adapter_id) is AdapterState.GONE:
            return False
        self._forget(adapter_id)
        self._loader.forget(adapter_id)
        self._reader.forget(adapter_id)
        self._serials.pop(adapter_id, None)
        return True

    def remove_all_adapters(self) -> None:
        """Ends a warm-up; outside of one, forgets all adapters (the base weights are new)."""
        if self._is_warming_up:
            self._end_warm_up()
            return
        for lora_id in self._cache.known:
            self._forget(lora_id)
        self._adapter_manager.forget_contents()

    def pin_adapter(self, adapter_id: int) -> bool:
        """Reads an adapter if necessary and keeps it in host memory and, once there, in its slot.

        It gets a slot now if the running batch leaves one, else with its next request.

        Raises:
            ValueError: The adapter was never added.
            PinLimitError: All slots but one are pinned already.
        """
        request = self._requests.get(adapter_id)
        if request is None:
            raise ValueError(
                f"LoRA adapter {adapter_id} cannot be pinned: it was never added. Add it first."
            )
        self._cache.pin(adapter_id)
        with suppress(SlotsExhaustedError):
            self._place({**self._step, adapter_id: request})
        return True

    def list_adapters(self) -> set[int]:
        """The adapters that are in host memory or in slots."""
        return set(self._cache.cpu_adapters)

    def slots_lost(self) -> None:
        """The slots' memory did not survive (sleep mode): adapters are copied there again."""
        self._cache.clear_slots()
        self._step = {}
        self._adapter_manager.forget_contents()

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
        for slot, lora_id in enumerate(self._cache.slots):
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


def _classify(error: BaseException) -> FailureKind:
    if isinstance(error, LoRAAdapterNotFoundError):
        return FailureKind.GONE
    return classify_failure(error)
