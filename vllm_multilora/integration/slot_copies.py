"""Copies into slots beside the engine's steps, on a thread of their own.

The adapter of a request that waits is copied into a slot that no running request uses, and the
request is let into a step when the copy is there, so that the others' steps do not contain it.
On a GPU the copy runs on a stream of its own: behind what was queued before it, which may still
read the slot, and beside the steps that follow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllm_multilora.cache.thread_placement import step_aside

if TYPE_CHECKING:
    from vllm_multilora.integration.host_adapter import HostAdapter
    from vllm_multilora.integration.model_manager import MultiLoRAModelManager

logger = logging.getLogger(__name__)


class SlotCopies:
    """Fills slots in the background; all methods are for the worker's main thread.

    Args:
        slots: The model's slots.
        on_copied: Told of every copy that was made: the adapter and seconds; on any thread.
    """

    def __init__(
        self, slots: MultiLoRAModelManager, on_copied: Callable[[int, float], None]
    ) -> None:
        self._slots = slots
        self._on_copied = on_copied
        self._thread = ThreadPoolExecutor(1, "multilora-copy", initializer=step_aside)
        self._device = slots.device
        # The copies that no step has been told of, by slot.
        self._under_way: dict[int, tuple[Future[None], int, HostAdapter]] = {}
        self._stream: Any = None

    def start(
        self, slot: int, lora_id: int, adapter: HostAdapter, then: Callable[[], None]
    ) -> None:
        """Begins to fill a slot that no step uses.

        Args:
            slot: The slot; from now on the adapter's.
            lora_id: The adapter.
            adapter: Its host copy.
            then: Called on the thread when the weights are there, or cannot be copied there.
        """
        self.finish([slot])
        self._prune()
        self._slots.assign_slot(slot, lora_id, adapter)
        queued = None
        if self._device.type != "cpu":
            queued = torch.cuda.current_stream(self._device).record_event()
        future = self._thread.submit(self._copy, slot, lora_id, adapter, queued, then)
        self._under_way[slot] = future, lora_id, adapter

    def __bool__(self) -> bool:
        """Whether there may be something to `finish`."""
        return bool(self._under_way)

    def finish(self, slots: Iterable[int | None]) -> None:
        """Waits for the copies into these slots, which a step is about to read or write.

        One that has failed is made again here, if the slot still is its adapter's.
        """
        for slot in slots:
            copy = self._under_way.pop(slot, None) if slot is not None else None
            if slot is None or copy is None:
                continue
            future, lora_id, adapter = copy
            error = future.exception()
            if error is not None and self._slots.lora_index_to_id[slot] == lora_id:
                logger.error("Adapter %d is copied into its slot again", lora_id, exc_info=error)
                with self.timed(lora_id):
                    self._slots.copy_weights(slot, adapter)

    @contextmanager
    def timed(self, lora_id: int) -> Iterator[None]:
        """Tells of the copy that is made in this block, unless it fails."""
        begin = time.perf_counter()
        yield
        self._on_copied(lora_id, time.perf_counter() - begin)

    def release(self, adapters: list[HostAdapter]) -> None:
        """Gives host copies' memory back without keeping the caller: unmapping takes a while.

        Args:
            adapters: Emptied on the thread; the caller keeps no other reference to its items.
        """
        self._prune()
        self._thread.submit(adapters.clear)

    def _prune(self) -> None:
        """Forgets copies that are there: nothing is to be waited for, or made again."""
        self._under_way = {
            slot: copy
            for slot, copy in self._under_way.items()
            if not copy[0].done() or copy[0].exception() is not None
        }

    def _copy(
        self,
        slot: int,
        lora_id: int,
        adapter: HostAdapter,
        queued: Any,
        then: Callable[[], None],
    ) -> None:
        try:
            with self.timed(lora_id):
                if queued is None:
                    self._slots.copy_weights(slot, adapter, threads=1)
                else:
                    self._copy_on_stream(slot, adapter, queued)
        finally:
            then()

    def _copy_on_stream(self, slot: int, adapter: HostAdapter, queued: Any) -> None:
        torch.cuda.set_device(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(queued)
            self._slots.copy_weights(slot, adapter)
        # Blocks this thread only. Steps that begin after `then` find the weights there.
        self._stream.record_event().synchronize()
