"""vLLM's own load generator against a server with this plugin, and one without.

`vllm bench serve --lora-modules ...` with random prompts, sixteen at a time, each for one of eight
adapters of ranks 8 to 64 on all projections of SmolLM2-135M in bfloat16. One server at a time, the
same seed; a short run before counts not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cpu_throughput import MAX_RANK, RANKS, fastest_dtype, write_random_adapter
from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.server import vllm_server
from benchmarks.loads.smollm2 import base_model, model_config

CLIENTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 16
ENGINES = {"plugin": (), "stock": ("--no-multilora",)}
MEASURES = {
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "first token, median, ms",
    "p99_ttft_ms": "p99, ms",
    "median_tpot_ms": "later tokens, median, ms",
}


@benchmark(
    workload="`vllm bench serve`: random prompts of 64 + 16 tokens, 16 at a time, over eight "
    "adapters of ranks 8 to 64 on all projections of SmolLM2-135M in bfloat16",
    control="stock vLLM (`--no-multilora`), with the same seed",
    figure="what vLLM's own load generator reports",
    compares_to="stock vLLM",
    quick={"requests": 4, "rounds": 1, "engines": "plugin"},
)
def upstream_load(
    requests: int = 32, rounds: int = 3, stock_rounds: int = 1, engines: str = "plugin,stock"
) -> Iterable[Figure]:
    """The load generator of vLLM itself against a server with this plugin, and one without."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        modules = {
            f"adapter-{n}": write_random_adapter(scratch / f"{n}", model_config(), rank, seed=n)
            for n, rank in enumerate(RANKS)
        }
        for engine in engines.split(","):
            with vllm_server(
                base_model(),
                *("--served-model-name", "base", "--dtype", fastest_dtype(), "--enforce-eager"),
                *("--max-model-len", "256", "--max-num-seqs", str(CLIENTS)),
                *("--no-enable-prefix-caching", "--enable-lora", "--max-loras", str(len(RANKS))),
                *("--max-lora-rank", str(MAX_RANK), *ENGINES[engine]),
                *("--lora-modules", *(f"{each}={path}" for each, path in modules.items())),
                log=scratch / f"{engine}.log",
            ) as server:
                generate(server.url, list(modules), len(modules), scratch)  # each adapter once
                found = [
                    generate(server.url, list(modules), requests, scratch)
                    for _ in range(stock_rounds if engine == "stock" else rounds)
                ]
            for key, measure in MEASURES.items():
                yield Figure(engine, measure, [one[key] for one in found])


def generate(url: str, adapters: list[str], requests: int, scratch: Path) -> dict[str, float]:
    """What the load generator reports.

    Raises:
        RuntimeError: Not all requests were answered.
    """
    result = scratch / "result.json"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
        *("--base-url", url, "--model", "base", "--tokenizer", str(base_model())),
        *("--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS)),
        *("--random-output-len", str(NEW_TOKENS), "--ignore-eos", "--seed", "0"),
        *("--num-prompts", str(requests), "--max-concurrency", str(CLIENTS)),
        *("--lora-assignment", "round-robin", "--save-result", "--result-filename", str(result)),
        *("--disable-tqdm", "--lora-modules", *adapters),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found: dict[str, float] = json.loads(result.read_text())
    if found["completed"] != requests:
        raise RuntimeError(f"{found['completed']} of {requests} requests were answered")
    return found
