"""Fills slots in parallel with the engine's steps, on its own thread, as the engine core orders.

No step uses a slot between the order to fill it and the answer, so that nothing waits for a copy.
On a GPU the copy runs on a stream of its own: behind what was queued before it, which may still
read the slot, and beside the steps that follow.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels import SlotIndex
from multilora_kernels.packs.pieces import registered_parts
from vllm_multilora.adapters.packing.pack_index import PackIndex, RankIndex
from vllm_multilora.failures import FailureKind, classify_failure, describe_failure
from vllm_multilora.integration.worker_link.fill_link import Answer, Filled, FillFailed, WorkerLink
from vllm_multilora.integration.worker_link.orders import Fill, Order
from vllm_multilora.store.memory.arena import OFFSET_MASK, PLACE_BITS
from vllm_multilora.store.memory.mapper import SegmentMapper
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.store.store_launch import processors

if TYPE_CHECKING:
    from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager
    from vllm_multilora.integration.worker.slots.special import SpecialParts

logger = logging.getLogger(__name__)

_REGISTER = 0  # cudaHostRegisterDefault
_RETRY_S = 1.0


NICENESS = 6
"""Above the process's own: about a fifth of a processor that the model wants too.

Measured with `benchmarks/cold/cold_loads.py` on two busy processors: the slowest steps beside loads
take as long as without, and 1.4 times as long at nearly the model's own priority. With the lowest
priority a cold request's first token can come seconds later.
"""


class SlotFiller:
    """Carries out orders; all methods but the thread's own are for the worker's main thread."""

    def __init__(
        self,
        manager: MultiLoRAModelManager,
        special: SpecialParts,
        link: WorkerLink | None,
    ) -> None:
        self._manager = manager
        self._special = special
        self._machine = self._place = 0
        self.link = link
        self._device = manager.device
        self._memory: SegmentMapper | None = None
        self._thread = ThreadPoolExecutor(1, "multilora-fill")
        self._under_way: dict[int, Future[Answer]] = {}
        self._has_slots = True  # not while the engine sleeps
        self._stream: Any = None
        self._copied: Any = None  # what the stream was last asked to do

    def open_memory(self, address: str, server: str, *, machine: int = 0, place: int = 0) -> None:
        """Says where the store is; from now on there may be orders."""
        self._machine, self._place = machine, place
        registered = None if self._device.type == "cpu" else Registered(self._device)
        self._memory = SegmentMapper(address, server, registered)
        if registered is not None:
            name, known = "multilora-segments", (weakref.ref(self), self._memory)
            threading.Thread(target=_map_ahead, name=name, args=known, daemon=True).start()

    def begin(self, order: Order) -> None:
        """Begins to carry out an order; its answer goes to the engine core."""
        self._submit(order).add_done_callback(self._tell)

    def is_filling(self, slot: int) -> bool:
        return slot in self._under_way and not self._under_way[slot].done()

    def await_slots(self, slots: Iterable[int]) -> None:
        """Waits until nothing is being copied into these slots."""
        for slot in slots if self._under_way else ():
            if (future := self._under_way.get(slot)) is not None:
                future.result()
        self._under_way = {s: f for s, f in self._under_way.items() if not f.done()}

    def await_all(self) -> None:
        self.await_slots(list(self._under_way))

    def slots_away(self) -> None:
        """Waits until nothing is being copied; from now on the slots' memory is not there."""
        self.await_all()
        self._has_slots = False

    def slots_back(self) -> None:
        """The slots' memory is there again; what they held is not."""
        self._has_slots = True

    def _submit(self, order: Order) -> Future[Answer]:
        try:
            return self._start(order)
        except Exception as error:
            # What is raised in a worker's call ends the engine.
            return _answered(_failure(order, error))

    def _start(self, order: Order) -> Future[Answer]:
        if isinstance(order, Fill) and not self._has_slots:
            # Pinned, or loaded, while the engine sleeps: when it wakes, all slots are filled anew.
            return _answered(Filled(order.order, None))
        queued = None
        if self._device.type != "cpu":
            queued = torch.cuda.current_stream(self._device).record_event()
        known = None
        if isinstance(order, Fill):
            owner = None if order.is_beside else order.request.lora_int_id
            self._manager.give_slot(order.slot, owner)
            if self._manager.factors is not None:
                digest = order.pack.digest if order.pack.dora else None
                known = self._manager.factors.begin(order.slot, digest)
        future = self._thread.submit(self._carry_out, order, queued, known)
        if isinstance(order, Fill):
            self._under_way[order.slot] = future
        return future

    def _tell(self, future: Future[Answer]) -> None:
        if self.link is not None:
            self.link.tell(future.result())

    def map_ahead(self, memory: SegmentMapper) -> bool:
        """Maps what the store has made, on the thread that fills slots; whether it could."""
        try:
            error = self._thread.submit(self._map_opened, memory).exception()
        except RuntimeError:  # the process ends
            return False
        if error is not None and not isinstance(error, StoreUnavailableError):
            logger.error("Host memory cannot be mapped ahead", exc_info=error)
        return error is None

    # What follows runs on the thread.

    def _map_opened(self, memory: SegmentMapper) -> None:
        if self._device.type != "cpu":
            torch.cuda.set_device(self._device)
        memory.map_opened()

    def _carry_out(self, order: Order, queued: Any, known: torch.Tensor | None) -> Answer:
        begin = time.perf_counter()
        yield_processor()
        try:
            if queued is None:
                self._fill_or_check(order, known)
            else:
                self._carry_out_on_stream(order, queued, known)
        except StoreUnavailableError as error:
            return FillFailed(order.order, FailureKind.UNREADABLE, str(error), is_gone=True)
        except Exception as error:
            # Whatever an adapter makes vLLM's classes or the system raise is that adapter's own.
            return _failure(order, error)
        return Filled(order.order, time.perf_counter() - begin)

    def _carry_out_on_stream(self, order: Order, queued: Any, known: torch.Tensor | None) -> None:
        torch.cuda.set_device(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            self._copied = torch.cuda.Event(blocking=True)  # others may need the processor
        try:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(queued)
                self._fill_or_check(order, known)
        finally:  # after an error too: copies that were queued still read the pack
            # Blocks this thread only. Steps that begin after the answer find the weights there.
            self._stream.record_event(self._copied).synchronize()

    def _fill_or_check(self, order: Order, known: torch.Tensor | None) -> None:
        memory = self._memory
        pack = order.elsewhere[self._machine - 1] if self._machine else order.pack
        assert memory is not None
        memory.drop_closed()
        with memory.view(pack.index_place, pack.index_bytes, pack.segments) as content:
            index = PackIndex.decode(content)
        special = None
        if pack.has_special:
            special = self._special.make(order.request, index, memory, pack.segments)
        if not isinstance(order, Fill):
            return
        own = index.ranks[self._place]
        segments = range(len(pack.segments))
        addresses = [memory.address(k << PLACE_BITS, pack.segments) for k in segments]
        bases = np.array(addresses, np.int64)
        addressed = _addressed(own, bases)
        self._manager.slot_table.scatter(order.slot, addressed)
        if self._manager.factors is not None:
            has = own.magnitude_places >= 0
            magnitudes = _addresses(own.magnitude_places[has], bases)
            own_rows = own.rows[has], own.ranks[has]
            self._manager.factors.fill(order.slot, *own_rows, magnitudes, known)
        self._manager.fill_rest(order.slot, own, special)


def _map_ahead(known: weakref.ref[SlotFiller], memory: SegmentMapper) -> None:
    """Runs on a thread of its own: has a filler's map what the store makes, while it reads.

    Registering a segment with the device takes hundreds of milliseconds, which would otherwise
    come between the order to fill a slot and its answer. An engine may end before its process
    does: its filler has the model, and goes when nobody else has it.
    """
    while True:
        has_come = memory.wait(_RETRY_S)
        filler = known()
        if filler is None:
            memory.close()
            return
        if memory is not filler._memory:
            return
        if has_come and not filler.map_ahead(memory):
            time.sleep(_RETRY_S)
        del filler


def _answered(answer: Answer) -> Future[Answer]:
    future: Future[Answer] = Future()
    future.set_result(answer)
    return future


def _failure(order: Order, error: Exception) -> FillFailed:
    kind = classify_failure(error)
    if kind is FailureKind.INTERNAL:
        logger.error("Adapter %r cannot be copied", order.request.lora_name, exc_info=error)
    return FillFailed(order.order, kind, describe_failure(error))


def _addressed(index: RankIndex, bases: npt.NDArray[np.int64]) -> SlotIndex:
    """An index with addresses in this process in the place of places."""
    return SlotIndex(
        rows=index.rows,
        a_ranks=index.a_ranks,
        ranks=index.ranks,
        a_addresses=_addresses(index.a_places, bases),
        b_addresses=_addresses(index.b_places, bases),
    )


def _addresses(
    places: npt.NDArray[np.int64], bases: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    return bases[places >> PLACE_BITS] + (places & OFFSET_MASK)


class Registered:
    """Page-locks segments for the GPU, part by part; steps' kernels are launched in between.

    Copies from memory that is not page-locked are slower, and right. CUDA keeps the error of a call
    that has failed, and the next kernel that the same thread launches seems to have failed: so each
    call is made by a thread that launches none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: dict[int, list[int]] = {}  # by segment, where those that are begin

    def add(self, number: int, address: int, size: int) -> None:
        self._parts[number] = []
        self._on_thread(self._add, number, address, size)

    def drop(self, number: int) -> None:
        """Lets go of it, before it is unmapped."""
        self._on_thread(self._drop, number)

    def _on_thread(self, call: Callable[..., None], *args: int) -> None:
        name, device = "multilora-fill-memory", (self._device,)
        with ThreadPoolExecutor(1, name, torch.cuda.set_device, device) as thread:
            thread.submit(call, *args).result()

    def _add(self, number: int, address: int, size: int) -> None:
        for begin, part in registered_parts(address, size):
            code = torch.cuda.cudart().cudaHostRegister(begin, part, _REGISTER)
            if int(code) != 0:
                logger.warning(
                    "Segment %d of adapters' host memory cannot be page-locked (CUDA error %d "
                    "after %d of %d bytes): copies from the rest of it to the GPU are slower.",
                    number,
                    int(code),
                    begin - address,
                    size,
                )
                return
            self._parts[number].append(begin)

    def _drop(self, number: int) -> None:
        for begin in self._parts.pop(number):
            torch.cuda.cudart().cudaHostUnregister(begin)


def yield_processor() -> None:
    """Takes the calling thread out of the way of the model's own threads.

    It may use the processors that its process is not bound to, too (`processors`), at a lower
    priority: every load would share one with the main thread, whose pauses the others wait for.

    To be called before every piece of work: the first parallel region of OpenMP's that a thread
    enters, in PyTorch say, binds it to the model's first processor.

    Does nothing where the platform forbids it.
    """
    try:
        niceness = os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICENESS  # the main thread's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        os.sched_setaffinity(0, processors())
    except OSError:
        return
