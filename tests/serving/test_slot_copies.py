"""Copies into slots on a thread of their own, over slots that only note what is asked of them."""

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.serving

LIMIT_S = 10.0


class Adapter:
    """A host copy."""


class Slots:
    """Stands in for the model manager."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.lora_index_to_id: list[int | None] = [None, None]
        self.copies: list[tuple[int, Any, str]] = []
        self.may_copy = threading.Event()
        self.error: Exception | None = None

    def assign_slot(self, slot: int, lora_id: int, adapter: Any) -> None:
        self.lora_index_to_id[slot] = lora_id

    def copy_weights(self, slot: int, adapter: Any, *, threads: int | None = None) -> None:
        assert self.may_copy.wait(LIMIT_S)
        error, self.error = self.error, None
        if error is not None:
            raise error
        self.copies.append((slot, adapter, threading.current_thread().name))


@pytest.fixture
def slots() -> Iterator[Slots]:
    slots = Slots()
    yield slots
    slots.may_copy.set()


def copies_into(slots: Slots) -> Any:
    from vllm_multilora.integration.slot_copies import SlotCopies

    return SlotCopies(slots, lambda lora_id, seconds: None)  # type: ignore[arg-type]


def test_a_copy_keeps_nobody_waiting_and_tells_when_it_is_there(slots: Slots) -> None:
    copies, told, adapter = copies_into(slots), threading.Event(), Adapter()
    copies.start(1, 7, adapter, told.set)
    assert slots.lora_index_to_id == [None, 7]
    assert not told.is_set()
    slots.may_copy.set()
    assert told.wait(LIMIT_S)
    ((slot, copied, thread),) = slots.copies
    assert (slot, copied) == (1, adapter)
    assert thread.startswith("multilora-copy")


def test_a_step_waits_for_the_copies_of_its_own_slots_only(slots: Slots) -> None:
    copies = copies_into(slots)
    copies.start(1, 7, Adapter(), lambda: None)
    assert copies
    copies.finish([0, None])
    assert slots.copies == []
    threading.Timer(0.05, slots.may_copy.set).start()
    copies.finish([1])
    assert len(slots.copies) == 1
    assert not copies


def test_a_copy_that_fails_is_told_of_and_made_again_by_the_step(slots: Slots) -> None:
    copies, told = copies_into(slots), threading.Event()
    slots.error = MemoryError("no room to stage it")
    slots.may_copy.set()
    copies.start(1, 7, Adapter(), told.set)
    assert told.wait(LIMIT_S)
    copies.finish([1])
    ((_, _, thread),) = slots.copies
    assert thread == threading.current_thread().name


def test_a_failed_copy_is_void_once_the_slot_is_another_adapters(slots: Slots) -> None:
    copies = copies_into(slots)
    slots.error = MemoryError("no room to stage it")
    slots.may_copy.set()
    copies.start(1, 7, Adapter(), lambda: None)
    slots.lora_index_to_id[1] = 8
    copies.finish([1])
    assert slots.copies == []


def test_memory_is_given_back_on_the_thread(slots: Slots) -> None:
    copies, freed_on = copies_into(slots), []
    adapter = Adapter()
    freed = threading.Event()

    def note() -> None:
        freed_on.append(threading.current_thread().name)
        freed.set()

    weakref.finalize(adapter, note)
    host = {7: adapter}
    del adapter
    copies.release([host.pop(7)])
    assert freed.wait(LIMIT_S)
    assert freed_on[0].startswith("multilora-copy")


def test_a_copy_that_is_there_keeps_no_memory(slots: Slots) -> None:
    copies, told, adapter = copies_into(slots), threading.Event(), Adapter()
    gone = weakref.ref(adapter)
    slots.may_copy.set()
    copies.start(1, 7, adapter, told.set)
    assert told.wait(LIMIT_S)
    slots.copies.clear()
    done = threading.Event()
    adapters = [adapter]
    del adapter
    while copies:  # the thread's future ends a moment after its last word
        copies.release([])
    copies.release(adapters)
    copies._thread.submit(done.set)
    assert done.wait(LIMIT_S)
    assert gone() is None
