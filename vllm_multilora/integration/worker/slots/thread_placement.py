"""Where the thread that fills slots runs: beside the model's own threads, and not in their way."""

from __future__ import annotations

import os
import threading

from vllm_multilora.store.store_launch import processors

NICENESS = 6
"""Above the process's own: about a fifth of a processor that the model wants too.

Measured with `benchmarks/cold/cold_loads.py` on two busy processors: the slowest steps beside loads
take as long as without, and 1.4 times as long at nearly the model's own priority. With the lowest
priority a cold request's first token can come seconds later.
"""


def step_aside() -> None:
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
