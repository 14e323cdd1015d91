"""Slots are filled where the process's own threads do not have to run."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from vllm_multilora.integration.worker.thread_placement import NICENESS, step_aside

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two processors",
)


def test_slots_are_filled_where_the_process_is_not_bound_to() -> None:
    from vllm_multilora.integration.worker.filler import SlotFiller

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # as vLLM does to a worker's main thread
    try:
        model = SimpleNamespace(device=torch.device("cpu"))
        filler = SlotFiller(model, special=None, link=None)  # type: ignore[arg-type]
        seen = filler._thread.submit(os.sched_getaffinity, 0).result(10)
        assert os.sched_getaffinity(0) == {min(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)
    assert seen == {min(allowed)} | os.sched_getaffinity(os.getppid())
    assert len(seen) > 1


def test_a_thread_that_steps_aside_yields_to_the_others() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    seen: list[int] = []

    def run() -> None:
        step_aside()
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [min(own + NICENESS, 19)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
