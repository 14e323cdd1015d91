"""Six tenants and three slots under constant load: how long each waits, here and in stock vLLM.

    python benchmarks/slot_sharing.py [--seconds 120] [--clients 4] [--flood 4] [--json FILE]

`vllm serve` with a small random Llama and adapters of ranks 8 to 64. Each client of a tenant asks
for 12 tokens, and for the next 12 as soon as it has them. `--flood` gives the first tenant more
clients than the others have. Per tenant: requests served, mean and 99th percentile of their
latency. One server after the other, on the same load for the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

sys.path.insert(0, str(Path(__file__).parents[1]))

SLOTS, TENANTS = 3, 6
RANKS = (8, 16, 24, 32, 64, 8)
PROMPT_TOKENS, NEW_TOKENS = 16, 12
ENGINES = {"plugin": {}, "stock": {"VLLM_PLUGINS": "none"}}


async def ask_until(
    end: float, client: httpx.AsyncClient, model: str, seed: int, latencies: list[float]
) -> None:
    """One client: one request after another; appends their latencies in seconds."""
    from tests.serving.tiny_models import VOCAB_SIZE

    numbers = random.Random(seed)
    while (begin := time.perf_counter()) < end:
        body = {
            "model": model,
            "prompt": [numbers.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        response = await client.post("/v1/completions", json=body)
        if response.is_error:
            raise RuntimeError(f"{model}: {response.status_code} {response.text}")
        latencies.append(time.perf_counter() - begin)


async def load(url: str, names: Sequence[str], clients: Sequence[int], seconds: float) -> list:
    """Runs all tenants' clients; each tenant's latencies."""
    latencies: list[list[float]] = [[] for _ in names]
    limits = httpx.Limits(max_connections=sum(clients))
    async with httpx.AsyncClient(
        base_url=url, timeout=None, trust_env=False, limits=limits
    ) as client:
        await asyncio.gather(
            *(ask_until(time.perf_counter() + 0.1, client, name, 0, []) for name in names)
        )
        end = time.perf_counter() + seconds
        await asyncio.gather(
            *(
                ask_until(end, client, name, 100 * tenant + number, latencies[tenant])
                for tenant, name in enumerate(names)
                for number in range(clients[tenant])
            )
        )
    return latencies


def run_engine(
    engine: str, clients: Sequence[int], seconds: float, scratch: Path
) -> dict[str, list[float]]:
    """Starts a server and loads it; the latencies in seconds, by tenant."""
    from tests.serving.recipes import AdapterRecipe
    from tests.serving.server import VllmServer
    from tests.serving.tiny_adapters import write_adapter
    from tests.serving.tiny_models import write_llama

    base = write_llama(scratch / "base")
    adapters = {
        name: write_adapter(base, scratch / name, AdapterRecipe(name, rank=rank), seed=rank)
        for name, rank in zip((f"tenant-{n}" for n in range(TENANTS)), RANKS, strict=True)
    }
    with VllmServer(
        base,
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "128"),
        *("--max-num-seqs", "16", "--no-enable-prefix-caching"),
        *("--enable-lora", "--max-loras", str(SLOTS), "--max-cpu-loras", str(TENANTS)),
        *("--max-lora-rank", "64"),
        *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
        log=scratch / "vllm.log",
        env=ENGINES[engine],
    ) as server:
        try:
            found = asyncio.run(load(server.url, tuple(adapters), clients, seconds))
        except Exception:
            print(server.log_tail(), file=sys.stderr)
            raise
    return dict(zip(adapters, found, strict=True))


def report(results: dict[str, dict[str, list[float]]], clients: Sequence[int]) -> dict[str, dict]:
    """Prints the table; returns its figures, in milliseconds."""
    figures: dict[str, dict] = {}
    print("\n| engine | tenant | rank | clients | served | mean | p99 |")
    print("|---" * 7 + "|")
    for engine, tenants in results.items():
        rows = figures[engine] = {}
        for (name, latencies), rank, count in zip(tenants.items(), RANKS, clients, strict=True):
            ordered = sorted(1000 * latency for latency in latencies)
            row = rows[name] = {
                "served": len(ordered),
                "mean": statistics.mean(ordered),
                "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            }
            print(
                f"| {engine} | {name} | {rank} | {count} | {row['served']} "
                f"| {row['mean']:.0f} ms | {row['p99']:.0f} ms |"
            )
    print()
    for engine, rows in figures.items():
        means = [row["mean"] for row in rows.values()]
        print(f"{engine}: slowest tenant's mean / fastest's: {max(means) / min(means):.2f}")
    return figures


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="of load, for each engine")
    parser.add_argument("--clients", type=int, default=4, help="of each tenant")
    parser.add_argument("--flood", type=int, help="clients of the first tenant, instead")
    parser.add_argument("--engine", choices=tuple(ENGINES), help="only this one")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    clients = [options.flood or options.clients, *[options.clients] * (TENANTS - 1)]
    results = {}
    for engine in [options.engine] if options.engine else ENGINES:
        print(f"{engine}: {options.seconds:.0f} s ...", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            results[engine] = run_engine(engine, clients, options.seconds, Path(scratch))
    figures = report(results, clients)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
