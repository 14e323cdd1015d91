"""One worker's adapters in all three tiers: on disk, in host memory, in slots.

`AdapterCache` decides, `BackgroundLoader` reads, the model manager fills slots; this class keeps
the three in step. All methods are for the worker's main thread; `_report` runs on the loader's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_multilora.cache import (
    Activation,
    AdapterCache,
    AdapterState,
    CacheFullError,
    MissingAdaptersError,
    PinLimitError,
    SlotsExhaustedError,
)
from vllm_multilora.cache.load_failures import FailureKind, LoadFailedError, LoadFailure
from vllm_multilora.cache.load_queue import LoadReport
from vllm_multilora.cache.loader import BackgroundLoader
from vllm_multilora.cache.readiness_events import (
    Displaced,
    Event,
    Failed,
    Lost,
    Placed,
    Ready,
)
from vllm_multilora.cache.shared_log import LogWriter
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.integration.adapter_gate import LOST_IN_STEP
from vllm_multilora.integration.adapter_observer import AdapterObserver
from vllm_multilora.integration.failures import classify
from vllm_multilora.integration.host_adapter import HostAdapter, HostAdapterLoader
from vllm_multilora.integration.slot_copies import SlotCopies
from vllm_multilora.metrics.recorder import Recorder

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.model_manager import MultiLoRAModelManager

logger = logging.getLogger(__name__)

RETRY_DELAY_S = 2.0
"""How long a failed load answers for further requests: a broken adapter must not wear the disk."""


class AdapterTiers:
    """Moves adapters between the tiers, and tells the engine core which are ready.

    Args:
        slots: The model's slots.
        reader: Reads adapters.
        new_cache: Makes the cache, given who is told of its events.
        settings: The plugin's.
        log: Where the engine core learns what is ready; None where it waits instead.
        recorder: Records metrics; None where this worker does not.

    Attributes:
        cache: Who is in which tier.
        usage: How each adapter has been used.
        host: The host copies.
        loader: Reads in the background.
        reader: What it reads with.
        removals: How many adapters have been removed so far, perhaps from a running batch.
    """

    def __init__(
        self,
        slots: MultiLoRAModelManager,
        reader: HostAdapterLoader,
        new_cache: Callable[..., AdapterCache],
        settings: MultiLoRAConfig,
        log: LogWriter | None,
        recorder: Recorder | None = None,
    ) -> None:
        self._requests: dict[int, LoRARequest] = {}
        self._observer = AdapterObserver(
            self._requests, recorder, new_cache, slots.lora_config.max_lora_rank
        )
        self.cache = self._observer.cache
        self.usage = self._observer.usage
        self.host: dict[int, HostAdapter] = {}
        self.reader = reader
        self.removals = 0
        self.loader: BackgroundLoader[LoRARequest, HostAdapter] = BackgroundLoader(
            reader.load,
            threads=settings.loader_threads,
            # What one batch can need: enough to fill all slots, a bound on memory beyond the tier.
            staged_limit=max(slots.lora_slots, settings.loader_threads),
            timeout_s=settings.load_timeout_s,
            retry_delay_s=RETRY_DELAY_S,
            on_done=self._report,
            classify=classify,
            on_end=self._observer.load_ended,
        )
        self._slots = slots
        self._copies = SlotCopies(slots, self._observer.copied)
        self._log = log
        self._load_timeout_s = settings.load_timeout_s
        self._pinned_names = frozenset(settings.pin)
        # The adapter registered last, where it found no room: whoever registers one mostly asks
        # for it next. At most one, until another adapter is loaded.
        self._spare: dict[int, HostAdapter] = {}
        # Kept by `ensure` until a step has used them.
        self._held: set[int] = set()
        # Written by the main thread, read by the loader's: the newest question about an adapter.
        self._serials: dict[int, int] = {}

    # Steps

    def load_for(self, step: Mapping[int, LoRARequest]) -> frozenset[int]:
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
        for lora_id in self.cache.protect_step(step.keys()):
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
                adapter = self._take_read(lora_id) or self.loader.wait(
                    lora_id, request, timeout_s=self._load_timeout_s
                )
            self._admit(lora_id, adapter, evict=True)
        except LoadFailedError as error:
            return error.failure
        except CacheFullError as error:
            failure = LoadFailure(FailureKind.NO_MEMORY, str(error))
            self._observer.load_failed(lora_id, failure)
            return failure
        return None

    def _take_read(self, lora_id: int) -> HostAdapter | None:
        """An adapter that was read and is not in host memory's tier yet."""
        return self._spare.pop(lora_id, None) or self.loader.take(lora_id)

    def _put_aside(self, lora_id: int, adapter: HostAdapter) -> None:
        self._drop_spare()
        self._spare[lora_id] = adapter

    def _drop_spare(self) -> None:
        if self._spare:
            self._copies.release([self._spare.popitem()[1]])

    def _admit(self, lora_id: int, adapter: HostAdapter, *, evict: bool) -> bool:
        """Takes an adapter that was read into the CPU tier; whether there was room."""
        self.cache.start_loading(lora_id)
        admission = self.cache.finish_loading(lora_id, adapter.nbytes, evict=evict)
        for victim in admission.evicted:
            self._drop(victim)
        if admission.admitted:
            self.host[lora_id] = adapter
            self._drop_spare()
        return admission.admitted

    def _reload_if_changed(self, request: LoRARequest) -> None:
        """Drops an adapter that was loaded from files that have changed since.

        vLLM reloads for every step of a request that has `load_inplace` set. Once for each
        request, and only where there is something new, is what it can mean.
        """
        loaded = self.host.get(request.lora_int_id)
        if loaded is not None and self.reader.has_changed(request, loaded):
            self._forget(request.lora_int_id)

    def place(self, adapter_ids: set[int]) -> None:
        """Gives the adapters of a step that begins, all in host memory, their slots."""
        self._observer.step(adapter_ids)
        self._give_slots(adapter_ids)

    def _give_slots(self, adapter_ids: set[int]) -> None:
        for activation in self.cache.begin_step(adapter_ids):
            if activation.displaced is not None:
                self._say(Displaced(activation.displaced))
            self._copies.finish([activation.slot])
            with self._copies.timed(activation.adapter_id), gpu_sync_allowed():
                self._slots.fill_slot(
                    activation.slot, activation.adapter_id, self.host[activation.adapter_id]
                )
        if self._copies:
            self._copies.finish(map(self.cache.slot_of, adapter_ids))
        self._observer.settle()
        for lora_id in self._held & adapter_ids:
            self._release(lora_id)

    # What the engine core asks for; see `adapter_gate`

    def prefetch(self, request: LoRARequest, serial: int) -> None:
        """Starts to load an adapter on a background thread, if it is not in host memory.

        The answer goes to the readiness log, under the serial number.
        """
        lora_id = request.lora_int_id
        self._note(request)
        self._serials[lora_id] = serial
        if request.load_inplace:
            # What was read before is not what is asked for.
            self._spare.pop(lora_id, None)
            self.loader.forget(lora_id)
        elif lora_id in self.host or lora_id in self._spare:
            self._say(Ready(lora_id, serial))
            return
        self.loader.want(lora_id, request)

    def place_ahead(self, lora_id: int, serial: int, needed: frozenset[int]) -> None:
        """Copies an adapter into a slot beside the steps, if one can be spared.

        The answer goes to the readiness log, under the serial number, when the copy is there; at
        once where none is made: a step that has the adapter will make it.

        Args:
            lora_id: The adapter; it was read.
            serial: Of the request to place it.
            needed: Adapters of the next step, which keep their places.
        """
        kept = [i for i in needed if self.cache.state(i) is not AdapterState.GONE]
        for needed_id in kept:
            self.cache.hold(needed_id)
        try:
            activation = self._make_place(lora_id)
        finally:
            for needed_id in kept:
                self.cache.release(needed_id)

        def tell() -> None:
            self._say(Placed(lora_id, serial))

        if activation is None:
            tell()
            return
        if activation.displaced is not None:
            self._say(Displaced(activation.displaced))
        with gpu_sync_allowed():
            self._copies.start(activation.slot, lora_id, self.host[lora_id], tell)

    def _make_place(self, lora_id: int) -> Activation | None:
        if lora_id not in self.host and (adapter := self._take_read(lora_id)):
            try:
                self._admit(lora_id, adapter, evict=True)
            except CacheFullError:
                self._put_aside(lora_id, adapter)
        return self.cache.place_ahead(lora_id)

    def ensure(self, request: LoRARequest) -> LoadFailure | None:
        """Loads an adapter now and keeps it until a step has used it; returns why it cannot be."""
        lora_id = request.lora_int_id
        self._note(request)
        if lora_id not in self.host and (failure := self._load_now(request)):
            return failure
        if lora_id not in self._held:
            self.cache.hold(lora_id)
            self._held.add(lora_id)
        self._observer.settle()
        return None

    def keep_staged(self, lora_id: int) -> None:
        """Takes a registered adapter into host memory if there is free room; else it stays on disk.

        One that is there already is replaced, between two steps: it was read anew.
        """
        adapter = self.loader.take(lora_id)
        request = self._requests.get(lora_id)
        if adapter is not None and request is not None:
            if lora_id in self.host:
                self._forget(lora_id)
                self._note(request)
            if not self._admit(lora_id, adapter, evict=False):
                self._put_aside(lora_id, adapter)
                self._say(Lost(lora_id))
        self._release(lora_id)

    def drop_staged(self, lora_id: int) -> None:
        """Nobody waits for the adapter any more."""
        self.loader.drop(lora_id)
        self._release(lora_id)
        if lora_id in self._requests and lora_id not in (*self.host, *self.cache.pinned):
            self._forget(lora_id)  # on disk only: whoever wants it names it again

    def settle(self) -> None:
        """All orders that came together are carried out."""
        self._observer.settle()

    @property
    def requests(self) -> Mapping[int, LoRARequest]:
        """The adapters that this worker knows, by number."""
        return self._requests

    def detach_log(self) -> None:
        """From now on the engine core waits for answers instead of reading them."""
        self._log = None

    def request(self, lora_id: int) -> LoRARequest | None:
        """What an adapter is read from and called; None if it is not known."""
        return self._requests.get(lora_id)

    def problems(self, lora_id: int) -> list[dict[str, Any]]:
        """All that was wrong with an adapter's files when they were read last."""
        return self.reader.problems(lora_id)

    def _release(self, lora_id: int) -> None:
        if lora_id in self._held:
            self._held.discard(lora_id)
            self.cache.release(lora_id)

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

    def add(self, request: LoRARequest) -> None:
        """Reads and checks an adapter; keeps it in host memory if there is free room.

        The engine core does this in the background; here everybody waits.

        Raises:
            LoadFailedError: The adapter cannot be served.
        """
        lora_id = request.lora_int_id
        is_new = self.cache.state(lora_id) is AdapterState.GONE
        if lora_id not in self.host or request.load_inplace:
            self._note(request)
            self.loader.forget(lora_id)
            self.loader.want(lora_id, request)
            try:
                adapter = self.loader.wait(lora_id, request, timeout_s=self._load_timeout_s)
            except LoadFailedError:
                if is_new:
                    self._forget(lora_id)
                raise
            if lora_id in self.host:
                self._forget(lora_id)
                self._note(request)
            self._admit(lora_id, adapter, evict=False)
        self._observer.settle()

    def _note(self, request: LoRARequest) -> None:
        """Makes an adapter known; another one under its number takes its place."""
        lora_id = request.lora_int_id
        known = self._requests.get(lora_id)
        if known is not None and known.lora_path != request.lora_path:
            self._forget(lora_id)
        self._requests[lora_id] = request
        self.cache.register(lora_id)
        if request.lora_name in self._pinned_names and lora_id not in self.cache.pinned:
            try:
                self.cache.pin(lora_id)
                self._observer.pinned(lora_id)
            except PinLimitError as error:
                logger.warning("%s", error)

    def _drop(self, lora_id: int) -> None:
        """Lets go of a host copy, and of the slot if the adapter had one."""
        self._copies.release([self.host.pop(lora_id)])
        self._say(Lost(lora_id))
        slots = self._slots.lora_index_to_id
        if lora_id in slots:
            self._slots.empty_slot(slots.index(lora_id))

    def _forget(self, lora_id: int) -> None:
        """Removes an adapter from everywhere; a step that still needs it reads it again."""
        self.removals += 1
        self.cache.end_step()
        self._release(lora_id)
        slot = self.cache.remove(lora_id)
        if slot is not None:
            self._slots.empty_slot(slot)
        if lora_id in self.host:
            self._copies.release([self.host.pop(lora_id)])
            self._say(Lost(lora_id))
        if lora_id in self._spare:
            self._drop_spare()
        self.loader.drop(lora_id)
        self._requests.pop(lora_id, None)

    def remove(self, lora_id: int) -> bool:
        """Forgets an adapter and frees its slot and memory; False if it is not known."""
        self.usage.forget(lora_id)
        if self.cache.state(lora_id) is AdapterState.GONE:
            return False
        self._forget(lora_id)
        self.loader.forget(lora_id)
        self.reader.forget(lora_id)
        self._serials.pop(lora_id, None)
        self._observer.settle()
        return True

    def remove_all(self) -> None:
        """Forgets all adapters."""
        for lora_id in self.cache.known:
            self.remove(lora_id)
        self._slots.forget_contents()

    def pin(self, lora_id: int, step: Mapping[int, LoRARequest]) -> None:
        """Reads an adapter if necessary and keeps it in host memory and, once there, in its slot.

        It gets a slot now if the running batch leaves one, else with its next request.

        Args:
            lora_id: The adapter.
            step: Adapters of the running batch.

        Raises:
            ValueError: The adapter was never added.
            LoadFailedError: It cannot be read.
            PinLimitError: All slots but one are pinned already.
        """
        request = self._requests.get(lora_id)
        if request is None:
            raise ValueError(
                f"LoRA adapter {lora_id} cannot be pinned: it was never added. Add it first."
            )
        if lora_id not in self.host and (failure := self._load_now(request)):
            raise LoadFailedError(lora_id, failure)
        self.cache.pin(lora_id)
        self._observer.pinned(lora_id)
        with suppress(SlotsExhaustedError, MissingAdaptersError):
            self._give_slots({*step, lora_id})
        self._observer.settle()

    def slots_lost(self) -> None:
        """The slots' memory did not survive (sleep mode): adapters are copied there again."""
        for lora_id in self.cache.slots:
            if lora_id is not None:
                self._say(Displaced(lora_id))
        self._copies.finish(range(len(self.cache.slots)))
        self.cache.clear_slots()
        self._slots.forget_contents()
        self._observer.settle()
