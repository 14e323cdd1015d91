"""Where loader threads run: beside the model's own threads, not in their way."""

from __future__ import annotations

import os


def step_aside() -> None:
    """Lets the calling thread use the processors that its process is not bound to, too.

    On CPUs vLLM binds a worker's threads to processors, one each, and whatever the worker starts
    inherits its main thread's: every load would share one with that thread, whose pauses
    the others wait for, while the processors that vLLM leaves free for such work stay idle. The
    process that started the worker is not bound, and may run wherever the operator allows it.

    Priorities stay as they are. On a machine with idle processors a lower one changes nothing, and
    on a full one a load of 50 ms takes up to seconds, for which requests wait.

    Does nothing where the platform has no such controls (other than Linux) or forbids it.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))
    except OSError:
        return
