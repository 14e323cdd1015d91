"""A store's reader with faults that no file can cause, in adapters that ask for them.

An adapter's folder may hold a file `fault` with one of these words: `hang`, `slow`, `die`,
`no memory` and `disk error`.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_multilora.store.adapter_reader import AdapterReader
from vllm_multilora.store.messages import StoreSettings
from vllm_multilora.store.reader import Source

FAULTY_READER = f"{__name__}:FaultyReader"
FAULT = "fault"
SLOW_S = 0.12
"""Processor time of a slow adapter's job before it opens anything."""


class FaultyReader(AdapterReader):
    def rules(self, settings: StoreSettings) -> Any:
        return settings, super().rules(settings)

    @contextlib.contextmanager
    def open(self, path: str, rules: Any) -> Iterator[Source]:
        settings, rules = rules
        with contextlib.suppress(FileNotFoundError):
            _make(Path(path, FAULT).read_text(), settings)
        with super().open(path, rules) as source:
            yield source


def _make(fault: str, settings: StoreSettings) -> None:
    if fault == "hang":
        time.sleep(5 * settings.timeout_s)
    elif fault == "slow":
        while time.process_time() < SLOW_S:  # asleep it would give its place to others
            pass
    elif fault == "die":
        os._exit(3)
    elif fault == "no memory":
        raise MemoryError("cannot allocate the adapter")
    elif fault == "disk error":
        raise OSError(5, "Input/output error")
