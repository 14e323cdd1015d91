"""`vllm:lora_requests_info` of several API servers: which adapters have requests now.

vLLM makes a series of every pair of lists, and the files that its API servers share forget none. So
each API server has a file for each engine, with the lists that it was told last. What is shown is
one series, of the newest lists of all engines: an engine tells each step's to one API server.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client.core import Metric

from vllm_multilora.metrics.process_stamps import ProcessStamp

_SUFFIX = ".lists"


class RequestLists:
    """What one API server is told.

    Args:
        folder: The engine's; see `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: dict[int, tuple[Path, object]] = {}

    def tell(self, engine: int, slots: int, running: Iterable[str], waiting: Iterable[str]) -> None:
        """What is so in a step.

        Args:
            engine: vLLM's number of the engine.
            slots: It has so many.
            running: The adapters with running requests.
            waiting: Those with waiting ones.

        Raises:
            OSError: The file cannot be written.
        """
        lists = [slots, [*running], [*waiting]]
        path, before = self._told.get(engine, (None, None))
        now = time.time_ns()
        if path is not None and lists == before:
            os.utime(path, ns=(now, now))
            return
        path = path or self._folder / f"{engine}-{ProcessStamp.own()}{_SUFFIX}"
        unfinished = path.with_suffix(".new")  # readers see all of it or nothing
        unfinished.write_text(json.dumps(lists))
        os.utime(unfinished, ns=(now, now))  # the system's own clock for files is coarser
        unfinished.rename(path)
        self._told[engine] = path, lists


def newest_lists(folder: Path) -> Iterator[Metric]:
    """The metric, where any API server was told anything.

    Raises:
        OSError: The engine is ending.
    """
    newest: dict[str, tuple[int, Path]] = {}
    for path in folder.glob(f"*{_SUFFIX}"):
        engine, told = path.name.partition("-")[0], (path.stat().st_mtime_ns, path)
        newest[engine] = max(told, newest.get(engine, told))
    if not newest:
        return
    each = [json.loads(path.read_bytes()) for _, path in newest.values()]
    labels = {
        "max_lora": str(sum(slots for slots, _, _ in each)),
        "running_lora_adapters": _joined(running for _, running, _ in each),
        "waiting_lora_adapters": _joined(waiting for _, _, waiting in each),
    }
    metric = Metric("vllm:lora_requests_info", "Running stats on lora requests.", "gauge")
    metric.add_sample(metric.name, labels, max(at for at, _ in newest.values()) / 1e9)
    yield metric


def _joined(lists: Iterable[list[str]]) -> str:
    return ",".join(dict.fromkeys(name for names in lists for name in names))
