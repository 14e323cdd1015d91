"""A store's reader with faults that no file can cause, in adapters that ask for them.

An adapter's folder may hold a file `fault` with one of these words: `hang`, `slow`, `die`,
`no memory`, `disk error` and `two at a time`: of two jobs that read the adapter at the same time,
the second one finds it bad.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.store.jobs.adapter_reader import AdapterReader
from vllm_multilora.store.protocol.messages import StoreSettings

FAULTY_READER = f"{__name__}:FaultyReader"
FAULT = "fault"
SLOW_S = 0.12
"""Processor time of a slow adapter's job before it opens anything."""

TOGETHER_S = 1.0
"""Time within which two jobs for an adapter begin."""


class FaultyReader(AdapterReader):
    def rules(self, settings: StoreSettings) -> Any:
        return settings, super().rules(settings)

    @contextlib.contextmanager
    def open(self, path: str, rules: Any) -> Iterator[Any]:
        settings, rules = rules
        with contextlib.suppress(FileNotFoundError):
            _make(Path(path, FAULT), settings)
        with super().open(path, rules) as source:
            yield source


def _make(file: Path, settings: StoreSettings) -> None:
    fault = file.read_text()
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
    elif fault == "two at a time":
        lock = os.open(file, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AdapterFormatError("another job is reading it") from None
        time.sleep(TOGETHER_S)
        os.close(lock)  # not at this job's end, which may come after the next one's beginning
