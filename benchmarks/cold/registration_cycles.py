"""Memory and time over many cycles of load, request, unload, each with another adapter.

A server with a tiny random Llama, over HTTP. Every cycle registers an adapter under a new name
(twenty different checkpoints of ranks 8 to 64 in turn), asks it for a few tokens and unloads it.
Reported is the resident memory of each process of the server, and of the store, after a warm-up and
at the end, and what the routes took. It fails if a process has grown by more than 2 %
and 16 MiB.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.server import vllm_server
from tests.serving.server import VllmServer
from vllm_multilora.store.store_launch import RunningStore
from vllm_multilora.toolbox.commands.store import describe

MIB = 2**20
ADAPTERS = 20
WARM_UP_SHARE = 0.1
MAX_GROWTH, MIN_MIB = 0.02, 16.0


def resident(server: VllmServer) -> dict[str, float]:
    """MiB of each of the server's processes and of the store, by what it is."""
    parent, store = psutil.Process(server.pid), psutil.Process(describe(RunningStore()).pid)
    found = {}
    for process in [parent, *parent.children(recursive=True), store]:
        name = " ".join(process.cmdline())[-60:] or process.name()
        if "resource_tracker" not in name:
            found[f"{process.pid} {name}"] = process.memory_info().rss / MIB
    return found


def cycle(server: VllmServer, number: int, folder: Path) -> tuple[float, float, float]:
    """Seconds to load, to answer and to unload."""
    name, times = f"customer-{number}", [time.perf_counter()]
    for path, body in (
        ("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}),
        ("/v1/completions", {"model": name, "prompt": [1, 2, 3, number % 200], "max_tokens": 3}),
        ("/v1/unload_lora_adapter", {"lora_name": name}),
    ):
        response = server.post(path, body)
        assert response.status_code == 200, f"{path}: {response.text}\n{server.log_tail()}"
        times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1], times[3] - times[2]


@benchmark(
    workload="load, request and unload of a small adapter over HTTP, each under a new name",
    control="each process's memory after the first tenth of the cycles",
    figure="how much of its memory a process has grown by",
    compares_to="2 % and 16 MiB, the limits",
    quick={"cycles": 20},
)
def registration_cycles(cycles: int = 1000) -> Iterable[Figure]:
    """Memory and time over many cycles of load, request, unload, each with another adapter."""
    from tests.serving.models.recipes import FLEET_RECIPES
    from tests.serving.models.tiny_adapters import write_adapter
    from tests.serving.models.tiny_models import write_llama

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = write_llama(root / "base")
        folders = [
            write_adapter(base, root / recipe.name, recipe, seed=seed)
            for seed, recipe in enumerate(FLEET_RECIPES[:ADAPTERS])
        ]
        with vllm_server(
            base,
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "64"),
            *("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "8"),
            *("--max-lora-rank", "64", "--disable-uvicorn-access-log"),
            log=root / "vllm.log",
            env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        ) as server:
            warm_up = max(ADAPTERS, int(cycles * WARM_UP_SHARE))
            for number in range(warm_up):
                cycle(server, number, folders[number % ADAPTERS])
            before = resident(server)
            times = [
                cycle(server, warm_up + number, folders[number % ADAPTERS])
                for number in range(cycles)
            ]
            after = resident(server)
    names = ("load, ms", "answer, ms", "unload, ms")
    for label, seconds in zip(names, zip(*times, strict=True), strict=True):
        yield Figure("", label, [1000 * took for took in seconds])
    grown = []
    for name, first in before.items():
        last = after.get(name, float("nan"))
        if last / first - 1 > MAX_GROWTH and last - first > MIN_MIB:
            grown.append(f"{name}: {first:.1f} to {last:.1f} MiB")
    most = max(100 * (after[name] / first - 1) for name, first in before.items() if name in after)
    yield Figure("", "most growth of a process, %", [most])
    if grown:
        raise SystemExit("grown: " + "; ".join(grown))
