"""`vllm:lora_requests_info`: which adapters have requests now, in all engines together.

vLLM makes a series of every pair of lists, and hears of a request with its first output. So each
engine core has a file with its own lists, and what is shown is one series of all engines' newest.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric

from vllm_multilora.metrics.series_file import ProcessStamp

_SUFFIX = ".lists"
_TRIES = 3
_AGAIN_S = 1.0


class RequestLists:
    """What one engine core says."""

    def __init__(self, folder: Path, engine: int, slots: int) -> None:
        self._path = folder / f"{engine}-{ProcessStamp.own()}{_SUFFIX}"
        self._slots = slots
        self._file: FileIO | None = None
        self._said: tuple[list[str], list[str]] | None = None
        self._say_at = 0.0

    def say(self, running: Iterable[str], waiting: Iterable[str]) -> None:
        """What is so in a step; written when it changes, and once a second; raises `OSError`."""
        now, lists = time.monotonic(), ([*running], [*waiting])
        if lists == self._said and now < self._say_at:
            return
        self._said, self._say_at = lists, now + _AGAIN_S
        self._file = self._file or FileIO(self._path, "w")
        # The wall clock may be set back: which lists are the newest follows from the other one.
        reported = json.dumps([now, time.time(), self._slots, *lists]).encode()
        # One line, with a sum by which readers tell that it is whole; below may be older ones.
        os.pwrite(self._file.fileno(), b"%d %s\n" % (zlib.crc32(reported), reported), 0)


def newest_lists(folder: Path) -> Iterator[Metric]:
    """The metric, where any engine has said anything; `OSError`: the engine is ending."""
    newest: dict[str, list[Any]] = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):  # in any order, each would be another series
        if (reported := _reported(path)) is not None:
            engine = path.name.partition("-")[0]
            newest[engine] = max(reported, newest.get(engine, reported))
    if not newest:
        return
    slots, running, waiting = zip(*(said[2:] for said in newest.values()), strict=True)
    labels = {
        "max_lora": str(sum(slots)),
        "running_lora_adapters": _joined(running),
        "waiting_lora_adapters": _joined(waiting),
    }
    metric = Metric("vllm:lora_requests_info", "Running stats on lora requests.", "gauge")
    metric.add_sample(metric.name, labels, max(at for _, at, *_ in newest.values()))
    yield metric


def _reported(path: Path) -> list[Any] | None:
    for _ in range(_TRIES):
        line = path.read_bytes().partition(b"\n")[0]
        check, _, reported = line.partition(b" ")
        if check == b"%d" % zlib.crc32(reported):
            found: list[Any] = json.loads(reported)
            return found
    return None


def _joined(lists: Iterable[Iterable[str]]) -> str:
    return ",".join(dict.fromkeys(name for names in lists for name in names))
