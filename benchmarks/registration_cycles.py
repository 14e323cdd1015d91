"""Memory and time over many cycles of load, request, unload, each with another adapter.

    python benchmarks/registration_cycles.py [--cycles 1000] [--json FILE]

A server with a tiny random Llama, over HTTP. Every cycle registers an adapter under a new name
(twenty different checkpoints of ranks 8 to 64 in turn), asks it for a few tokens and unloads it.
Reported is the resident memory of each process of the server, and of the store, after a warm-up and
at the end, and what the routes took. The exit status is 1 if a process has grown by more than 2 %
and 16 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.serving.recipes import FLEET_RECIPES
from tests.serving.server import VllmServer
from tests.serving.tiny_adapters import write_adapter
from tests.serving.tiny_models import write_llama
from vllm_multilora.commands.store import describe
from vllm_multilora.store.launch import RunningStore

MIB = 2**20
ADAPTERS = 20
WARM_UP_SHARE = 0.1
MOST_GROWTH, LEAST_MIB = 0.02, 16.0


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


def main() -> int:
    """Runs the cycles and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = write_llama(root / "base")
        folders = [
            write_adapter(base, root / recipe.name, recipe, seed=seed)
            for seed, recipe in enumerate(FLEET_RECIPES[:ADAPTERS])
        ]
        with VllmServer(
            base,
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "64"),
            *("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "8"),
            *("--max-lora-rank", "64", "--disable-uvicorn-access-log"),
            log=root / "vllm.log",
            env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        ) as server:
            warm_up = max(ADAPTERS, int(options.cycles * WARM_UP_SHARE))
            for number in range(warm_up):
                cycle(server, number, folders[number % ADAPTERS])
            before = resident(server)
            times = [
                cycle(server, warm_up + number, folders[number % ADAPTERS])
                for number in range(options.cycles)
            ]
            after = resident(server)
    return report(before, after, times, options.json)


def report(
    before: dict[str, float],
    after: dict[str, float],
    times: list[tuple[float, float, float]],
    json_file: Path | None,
) -> int:
    """Prints the figures; 1 if a process has grown."""
    grown = False
    print(f"| process | MiB before | after {len(times)} cycles | growth |\n|---|---|---|---|")
    for name, first in before.items():
        last = after.get(name, float("nan"))
        growth = last / first - 1
        grown |= growth > MOST_GROWTH and last - first > LEAST_MIB
        print(f"| {name} | {first:.1f} | {last:.1f} | {100 * growth:+.2f} % |")
    for label, seconds in zip(("load", "answer", "unload"), zip(*times, strict=True), strict=True):
        print(f"{label}: median {1000 * statistics.median(seconds):.1f} ms")
    if json_file:
        json_file.write_text(json.dumps({"before": before, "after": after, "times": times}) + "\n")
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
