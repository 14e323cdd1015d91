"""`vllm:lora_requests_info`: which adapters have requests now, in all engines together.

vLLM makes a series of every pair of lists, and the files that its API servers share forget none. So
each API server has a file for each engine, with the lists that it was told last. What is shown is
one series, of the newest lists of all engines: an engine tells each step's to one API server.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric

from vllm_multilora.metrics.process_stamps import ProcessStamp

_SUFFIX = ".lists"
_TRIES = 3


class RequestLists:
    """What one API server is told.

    Args:
        folder: The engine's; see `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, FileIO] = {}

    def tell(self, engine: int, slots: int, running: Iterable[str], waiting: Iterable[str]) -> None:
        """What is so in a step.

        Args:
            engine: vLLM's number of the engine.
            slots: It has so many.
            running: The adapters with running requests.
            waiting: Those with waiting ones.

        Raises:
            OSError: It cannot be written.
        """
        if (file := self._files.get(engine)) is None:
            path = self._folder / f"{engine}-{ProcessStamp.own()}{_SUFFIX}"
            file = self._files[engine] = FileIO(path, "w")
        # The wall clock may be set back: which lists are the newest follows from the other one.
        times = time.monotonic(), time.time()
        told = json.dumps([*times, slots, [*running], [*waiting]]).encode()
        # One line, with a sum by which readers tell that it is whole; below may be older ones.
        os.pwrite(file.fileno(), b"%d %s\n" % (zlib.crc32(told), told), 0)


def newest_lists(folder: Path) -> Iterator[Metric]:
    """The metric, where any API server was told anything.

    Raises:
        OSError: The engine is ending.
    """
    newest: dict[str, list[Any]] = {}
    for path in folder.glob(f"*{_SUFFIX}"):
        if (told := _told(path)) is not None:
            engine = path.name.partition("-")[0]
            newest[engine] = max(told, newest.get(engine, told))
    if not newest:
        return
    labels = labels_of((slots, *lists) for _, _, slots, *lists in newest.values())
    metric = Metric("vllm:lora_requests_info", "Running stats on lora requests.", "gauge")
    metric.add_sample(metric.name, labels, max(at for _, at, *_ in newest.values()))
    yield metric


def labels_of(engines: Iterable[Sequence[Any]]) -> dict[str, str]:
    """What the one series is labelled with.

    Args:
        engines: Of each its slots, and the adapters with running and with waiting requests.
    """
    slots, running, waiting = zip(*engines, strict=True)
    return {
        "max_lora": str(sum(slots)),
        "running_lora_adapters": _joined(running),
        "waiting_lora_adapters": _joined(waiting),
    }


def _told(path: Path) -> list[Any] | None:
    for _ in range(_TRIES):
        line = path.read_bytes().partition(b"\n")[0]
        check, _, told = line.partition(b" ")
        if check == b"%d" % zlib.crc32(told):
            found: list[Any] = json.loads(told)
            return found
    return None


def _joined(lists: Iterable[Iterable[str]]) -> str:
    return ",".join(dict.fromkeys(name for names in lists for name in names))
