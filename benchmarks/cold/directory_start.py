"""What an adapter directory adds to a server's start.

`vllm serve` with a tiny random Llama, started alternately with an empty directory and with one of
many adapters, until `/v1/models` answers with all of them. Reported are the seconds of each start,
the ratio within each round, the API server's memory, what a scrape of `/metrics` takes, and what
one look at the directory costs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.server import vllm_server
from vllm_multilora.adapters.directory import AdapterDirectories, Settling
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots

LOOKS = 9


@dataclass(frozen=True)
class Started:
    """A server that names all adapters.

    Attributes:
        seconds: Until it did.
        mib: Resident memory of the API server.
        scrape_ms: Median time that `/metrics` takes.
    """

    seconds: float
    mib: float
    scrape_ms: float


def fill(directory: Path, adapter: Path, folders: int) -> None:
    """Puts an adapter under many names."""
    for number in range(folders):
        folder = directory / f"customer-{number}"
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(adapter / file, folder / file)


def start(base: Path, directory: Path, expected: int, log: Path) -> Started:
    """Starts a server, and looks at it when it names all adapters."""
    began = time.perf_counter()
    with vllm_server(
        base,
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "128"),
        *("--enable-lora", "--max-loras", "3", "--max-lora-rank", "64"),
        *("--multilora-adapter-dir", str(directory)),
        log=log,
        new_interpreter=True,
    ) as server:
        models = server.get("/v1/models").json()["data"]
        seconds = time.perf_counter() - began
        assert len(models) == 1 + expected, f"{len(models)} models\n{server.log_tail()}"
        mib = psutil.Process(server.pid).memory_info().rss / 2**20
        scrapes = []
        for _ in range(LOOKS):
            asked = time.perf_counter()
            server.get("/metrics").raise_for_status()
            scrapes.append(1e3 * (time.perf_counter() - asked))
    return Started(seconds, mib, statistics.median(scrapes))


def look_ms(directory: Path) -> float:
    """Milliseconds of CPU time of one look, everything being in the system's cache."""
    directories = AdapterDirectories([str(directory)], AllowedRoots((), [directory]))
    settling, times = Settling(), []
    for _ in range(LOOKS):
        began = time.thread_time()
        settling.settle(directories.scan())
        times.append(1e3 * (time.thread_time() - began))
    return statistics.median(times)


@benchmark(
    workload="`vllm serve` with a tiny random Llama, until it names all adapters of a directory",
    control="the same with an empty directory, in the same rounds",
    figure="seconds to start with the adapters over seconds without",
    compares_to="1.05, the goal",
    quick={"folders": 20, "rounds": 1},
)
def directory_start(folders: int = 500, rounds: int = 2) -> Iterable[Figure]:
    """What an adapter directory adds to a server's start."""
    from tests.serving.models.recipes import LINEAR_RECIPES
    from tests.serving.models.tiny_adapters import write_adapter
    from tests.serving.models.tiny_models import write_llama

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = write_llama(root / "base")
        adapter = write_adapter(base, root / "adapter", LINEAR_RECIPES[0], seed=0)
        sizes = {"empty": 0, "full": folders}
        for name, count in sizes.items():
            (root / name).mkdir()
            fill(root / name, adapter, count)
        # The first start of all reads vLLM from disk.
        start(base, root / "empty", 0, root / "log")
        started: dict[str, list[Started]] = {name: [] for name in sizes}
        for number in range(rounds):
            # Each comes first in every other round.
            for name in sorted(sizes, reverse=number % 2 == 1):
                started[name].append(start(base, root / name, sizes[name], root / "log"))
        milliseconds = look_ms(root / "full")
    for name, count in sizes.items():
        found = started[name]
        case = f"{count:,} adapters"
        yield Figure(case, "start, s", [one.seconds for one in found])
        pairs = zip(found, started["empty"], strict=True)
        yield Figure(case, "/ empty", [one.seconds / empty.seconds for one, empty in pairs])
        yield Figure(case, "API server, MiB", [one.mib for one in found])
        yield Figure(case, "/metrics, ms", [one.scrape_ms for one in found])
    yield Figure(f"{folders:,} adapters", "one look, ms of processor time", [milliseconds])
