"""Six tenants and three slots under constant load: how long each waits, here and in stock vLLM.

`vllm serve` with a small random Llama and adapters of ranks 8 to 64. Each client of a tenant asks
for 12 tokens, and for the next 12 as soon as it has them. `flood` gives the first tenant more
clients than the others have. Per tenant: requests served, mean and 99th percentile of their
latency. One server after the other, on the same load for the same time.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import httpx

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.server import vllm_server

SLOTS, TENANTS = 3, 6
RANKS = (8, 16, 24, 32, 64, 8)
PROMPT_TOKENS, NEW_TOKENS = 16, 12
ENGINES = {"plugin": {}, "stock": {"VLLM_PLUGINS": "none"}}


async def ask_until(
    end: float, client: httpx.AsyncClient, model: str, seed: int, latencies: list[float]
) -> None:
    """One client: one request after another; appends their latencies in seconds."""
    from tests.serving.models.tiny_models import VOCAB_SIZE

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
    from tests.serving.models.recipes import AdapterRecipe
    from tests.serving.models.tiny_adapters import write_adapter
    from tests.serving.models.tiny_models import write_llama

    base = write_llama(scratch / "base")
    adapters = {
        name: write_adapter(base, scratch / name, AdapterRecipe(name, rank=rank), seed=rank)
        for name, rank in zip((f"tenant-{n}" for n in range(TENANTS)), RANKS, strict=True)
    }
    with vllm_server(
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


@benchmark(
    workload="six tenants' four clients each, over three slots, for two minutes",
    control="stock vLLM under the same load",
    figure="the slowest tenant's mean latency over the fastest's",
    compares_to="1, where slots are shared evenly",
    quick={"seconds": 5.0},
)
def slot_sharing(
    seconds: float = 120.0, clients: int = 4, flood: int = 0, engine: str = ""
) -> Iterable[Figure]:
    """Six tenants and three slots under constant load: how long each waits, here and in stock vLLM.

    Args:
        seconds: Of load, for each engine.
        clients: Of each tenant.
        flood: Clients of the first tenant, instead.
        engine: Only this one: `plugin` or `stock`.
    """
    counts = [flood or clients, *[clients] * (TENANTS - 1)]
    for name in [engine] if engine else ENGINES:
        print(f"{name}: {seconds:.0f} s ...", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            found = run_engine(name, counts, seconds, Path(scratch))
        means = [1000 * statistics.mean(latencies) for latencies in found.values()]
        for rank, mean, (tenant, latencies) in zip(RANKS, means, found.items(), strict=True):
            ordered = sorted(latencies)
            case = f"{name}, {tenant} of rank {rank}"
            yield Figure(case, "served", [len(ordered)])
            yield Figure(case, "mean, ms", [mean])
            yield Figure(case, "p99, ms", [1000 * ordered[int(0.99 * (len(ordered) - 1))]])
        yield Figure(name, "slowest mean / fastest", [max(means) / min(means)])
