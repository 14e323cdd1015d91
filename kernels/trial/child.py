"""The process in which a trial runs: `python -m multilora_kernels.trial.child`.

It reads one request from its standard input and writes a line for each case as it begins and ends.
A card's kernels may hang or fault, and take their process's context with them; here nothing else
is lost. It ends with its parent, whose end of the pipe closes then.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

READY = "ready"
"""The line that says that imports and the device's context are done: what follows are cases."""


OUT_OF_MEMORY = 3
"""Exit status where the device has no room for a case."""


def main() -> None:
    """Runs the request's cases."""
    # Libraries print what they like: the results have a descriptor of their own.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = sys.stdin.readline()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()

    import torch

    from multilora_kernels.trial.cases import Begun, Ended, LimitedClock, run_cases
    from multilora_kernels.trial.clocks import GraphClock
    from multilora_kernels.trial.requests import TrialRequest, encode_event

    asked = TrialRequest.decode(request)
    device = torch.device(asked.device)
    torch.set_float32_matmul_precision("highest")
    clock = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if asked.timing_s > 0:
            clock = LimitedClock(GraphClock(device), asked.timing_s)
    backends = {name: each.load() for name, each in asked.backends.items()}
    print(READY, file=results)

    def report(event: Begun | Ended) -> None:
        print(encode_event(event), file=results)
        if isinstance(event, Ended) and event.problem and not _works(device):
            os._exit(1)  # the parent begins again with the next case, on a new context

    try:
        with torch.inference_mode():
            run_cases(
                asked.kinds,
                asked.rows,
                backends,
                report,
                device=device,
                max_tokens=asked.max_tokens,
                clock=clock,
                skip=asked.skip,
            )
    except torch.OutOfMemoryError:
        os._exit(OUT_OF_MEMORY)
    # At its end an interpreter waits for what may never come, as a lock of a thread.
    results.flush()
    os._exit(0)


def _works(device: Any) -> bool:
    """Whether the device takes further calls: a fault ends its context."""
    import torch

    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(2)


if __name__ == "__main__":
    main()
