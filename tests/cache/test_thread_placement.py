"""Loads run where the process's own threads do not have to."""

import os
import threading

import pytest

from vllm_multilora.cache.load_queue import LoadReport
from vllm_multilora.cache.loader import BackgroundLoader
from vllm_multilora.cache.thread_placement import NICENESS, step_aside

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two processors",
)


def test_loads_may_use_processors_that_the_process_is_not_bound_to() -> None:
    allowed = os.sched_getaffinity(0)
    done = threading.Event()
    seen: list[set[int]] = []

    def load(request: int) -> int:
        seen.append(os.sched_getaffinity(0))
        return request

    def on_done(adapter_id: int, report: LoadReport[int]) -> None:
        done.set()

    os.sched_setaffinity(0, {min(allowed)})  # as vLLM does to a worker's main thread
    try:
        loader = BackgroundLoader(
            load, threads=1, staged_limit=1, timeout_s=10, retry_delay_s=0, on_done=on_done
        )
        loader.want(1, 1)
        assert done.wait(10)
        assert os.sched_getaffinity(0) == {min(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)
    assert loader.close(10)
    assert seen == [{min(allowed)} | os.sched_getaffinity(os.getppid())]
    assert len(seen[0]) > 1


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
