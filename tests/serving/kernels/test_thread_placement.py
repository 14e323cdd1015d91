"""Slots are filled where the process's own threads do not have to run."""

import os
import subprocess
import sys
import threading
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch

from tests.engine.fake_engine import lora, pack_info
from vllm_multilora.integration.worker.slots.filler import NICENESS, yield_processor
from vllm_multilora.integration.worker_link.fill_link import Answer
from vllm_multilora.integration.worker_link.orders import Check, Order

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two processors",
)


def test_slots_are_filled_where_the_process_is_not_bound_to() -> None:
    """Each of them, whatever has bound the thread that fills them meanwhile."""
    from vllm_multilora.integration.worker.slots.filler import SlotFiller

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # as vLLM does to a worker's main thread
    seen = []

    class Filler(SlotFiller):
        def _fill_or_check(self, order: Order, known: torch.Tensor | None) -> None:
            seen.append(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {min(allowed)})

    try:
        model = SimpleNamespace(device=torch.device("cpu"))
        answers: SimpleQueue[Answer] = SimpleQueue()
        link = SimpleNamespace(tell=answers.put)
        filler = Filler(model, special=None, link=link)  # type: ignore[arg-type]
        for order in (1, 2):
            filler.begin(Check(order, lora(1), pack_info(1)))
            answers.get(timeout=60)
        assert os.sched_getaffinity(0) == {min(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)
    assert seen == [{min(allowed)} | os.sched_getaffinity(os.getppid())] * 2
    assert len(seen[0]) > 1


def test_a_copy_does_not_bind_its_thread() -> None:
    """As an OpenMP region would, to where the model's own first thread is."""
    script = """
import os, threading
from tests.kernels.packs.test_scatter import make_adapter, make_model

def run():
    os.sched_setaffinity(0, allowed)
    index, _, _buffer = make_adapter(model, {0: 5, 1: 16})
    model.table.scatter(0, index, backend="native")
    print(os.sched_getaffinity(0) == allowed)

allowed = os.sched_getaffinity(os.getppid())
model = make_model()
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    bound = os.environ | {"GOMP_CPU_AFFINITY": str(min(os.sched_getaffinity(0)))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=bound, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_a_thread_that_yields_lets_the_others_run() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    seen: list[int] = []

    def run() -> None:
        yield_processor()
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [min(own + NICENESS, 19)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
