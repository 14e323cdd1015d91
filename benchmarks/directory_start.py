"""What an adapter directory adds to a server's start.

    python benchmarks/directory_start.py [--folders 500] [--rounds 2] [--json FILE]

`vllm serve` with a tiny random Llama, started alternately with an empty directory and with one of
many adapters, until `/v1/models` answers with all of them. Reported are the seconds of each start,
the ratio within each round, and what one look at the directory costs.
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

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.serving.recipes import LINEAR_RECIPES
from tests.serving.server import VllmServer
from tests.serving.tiny_adapters import write_adapter
from tests.serving.tiny_models import write_llama
from vllm_multilora.adapters.allowed_roots import AllowedRoots
from vllm_multilora.adapters.directory import AdapterDirectories, Settling

LOOKS = 9


def fill(directory: Path, adapter: Path, folders: int) -> None:
    """Puts an adapter under many names."""
    for number in range(folders):
        folder = directory / f"customer-{number}"
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(adapter / file, folder / file)


def start(base: Path, directory: Path, expected: int, log: Path) -> float:
    """Seconds until a server names all adapters."""
    began = time.perf_counter()
    with VllmServer(
        base,
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "128"),
        *("--enable-lora", "--max-loras", "3", "--max-lora-rank", "64"),
        *("--multilora-adapter-dir", str(directory)),
        log=log,
    ) as server:
        models = server.get("/v1/models").json()["data"]
        seconds = time.perf_counter() - began
        assert len(models) == 1 + expected, f"{len(models)} models\n{server.log_tail()}"
    return seconds


def look_ms(directory: Path) -> float:
    """Milliseconds of CPU time of one look, everything being in the system's cache."""
    directories = AdapterDirectories([str(directory)], AllowedRoots((), [directory]))
    settling, times = Settling(), []
    for _ in range(LOOKS):
        began = time.thread_time()
        settling.settle(directories.scan())
        times.append(1e3 * (time.thread_time() - began))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folders", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = write_llama(root / "base")
        adapter = write_adapter(base, root / "adapter", LINEAR_RECIPES[0], seed=0)
        sizes = {"empty": 0, "full": arguments.folders}
        for name, folders in sizes.items():
            (root / name).mkdir()
            fill(root / name, adapter, folders)
        # The first start of all reads vLLM from disk.
        start(base, root / "empty", 0, root / "log")
        seconds: dict[str, list[float]] = {name: [] for name in sizes}
        for number in range(arguments.rounds):
            # Each comes first in every other round.
            for name in sorted(sizes, reverse=number % 2 == 1):
                seconds[name].append(start(base, root / name, sizes[name], root / "log"))
        milliseconds = look_ms(root / "full")
    ratios = [full / empty for full, empty in zip(seconds["full"], seconds["empty"], strict=True)]
    print(f"{'round':>5}  {'empty, s':>9}  {arguments.folders:>5} folders, s  ratio")
    for number, ratio in enumerate(ratios):
        empty, full = seconds["empty"][number], seconds["full"][number]
        print(f"{number + 1:>5}  {empty:>9.1f}  {full:>16.1f}  {ratio:.3f}")
    print(
        f"median ratio {statistics.median(ratios):.3f}; one look: {milliseconds:.1f} ms of CPU time"
    )
    if arguments.json is not None:
        result = {"seconds": seconds, "ratios": ratios, "look_ms": milliseconds}
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
