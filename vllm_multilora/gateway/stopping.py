"""Knows when this server is told to stop.

vLLM hears SIGTERM and SIGINT itself, and tells nobody: until its running requests have ended, it
takes new ones that it cannot answer, and says that it is healthy.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from vllm_multilora.integration.server.requests.engine_calls import STOP

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listen() -> None:
    """Hears the signals beside the event loop; only where that has handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        before = signal.getsignal(number)
        if callable(before) and before is not signal.default_int_handler:  # which end it
            signal.signal(number, partial(_hear, before))
            signal.siginterrupt(number, False)


def _hear(before: Callable[..., Any], number: int, frame: FrameType | None) -> None:
    STOP.has_come = True
    STOP.act()
    before(number, frame)
