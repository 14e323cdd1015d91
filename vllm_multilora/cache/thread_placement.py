"""Where and when loader threads run: beside the model's own threads, not in their way."""

from __future__ import annotations

import os
import threading

NICENESS = 5
"""Added to a loader thread's; on a full processor it gets a quarter of what another thread gets.
Enough for a load to end soon, which requests wait for, and little enough for engine steps."""


def step_aside() -> None:
    """Takes the calling thread off the processors that its process is bound to, and behind others.

    On CPUs vLLM binds a worker's threads to processors, one each, and whatever the worker starts
    inherits its main thread's: every load would share one with that thread, whose pauses
    the others wait for, while the processors that vLLM leaves free for such work stay idle. The
    process that started the worker is not bound, and may run wherever the operator allows it.

    Does nothing where the platform has no such controls (other than Linux) or forbids it.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    try:
        allowed = os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid())
        os.sched_setaffinity(0, allowed)
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
    except OSError:
        return
