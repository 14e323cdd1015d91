"""What running requests notice of other tenants' cold adapters: this plugin against stock vLLM.

    python benchmarks/cold_loads.py [--rounds 3] [--stock-rounds 1] [--json FILE]

`vllm serve` with SmolLM2-135M in float32; two streams, one with an adapter and one of the base
model, generate all the time. Beside them, 12 requests come one after another, each for another
tenant's adapter (rank 64, all projections). The phases differ in where that adapter is:

- `quiet`: no requests beside the streams
- `slot`: in a slot; what the requests' own prompts and tokens cost, and nothing else
- `memory`: in host memory, not in a slot: copied into one first
- `new`: unknown; registered by `/v1/load_lora_adapter`, then asked for
- `disk`: registered and not in memory, as most of a large fleet

The table shows the time between two tokens of the streams (both taken together), relative to the
same engine's `quiet` and `slot` phases, and the requests' time to first token; for `new` that is
from the registration on. Medians over rounds; one server at a time; files are in the page cache.
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
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples" / "demo")]

RANK = 64
SLOTS, HOST_PLACES = 3, 6
STREAM_TOKENS, STREAM_PROMPT = 1500, 32
WARM_UP_TOKENS = 5
PROMPT_TOKENS, NEW_TOKENS = 16, 8
PHASES = ("quiet", "slot", "memory", "new", "disk")
ENGINES = {"plugin": {}, "stock": {"VLLM_PLUGINS": "none"}}


@dataclass(frozen=True)
class Phase:
    """What one phase of one round has shown.

    Attributes:
        gaps_ms: Time between two tokens of a stream, both streams'.
        first_token_ms: Time to first token of each request beside the streams.
        registration_ms: The part of it that its registration took.
    """

    gaps_ms: list[float]
    first_token_ms: list[float] = field(default_factory=list)
    registration_ms: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """The gap that a share of all gaps is not longer than."""
        ordered = sorted(self.gaps_ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Load:
    """The requests of a benchmark run, sent to one server.

    Args:
        client: Of the server.
        folder: An adapter; each name is served from a link of its own, as files of its own.
        requests: Beside the streams, per phase.
    """

    def __init__(self, client: httpx.AsyncClient, folder: Path, requests: int) -> None:
        self._client = client
        self._folder = folder
        self._requests = requests
        self._numbers = random.Random(0)

    async def run_round(self, number: int) -> dict[str, Phase]:
        """All phases, with adapters that the server has not seen before."""
        warm = [f"warm-{number}-{i}" for i in range(HOST_PLACES - 1)]
        cold = [f"cold-{number}-{i}" for i in range(self._requests)]
        phases = {"quiet": await self._phase([], False)}
        for name in warm:
            await self._register(name)
        await self._request(warm[0])
        phases["slot"] = await self._phase([warm[0]] * self._requests, False)
        for name in warm:
            await self._request(name)
        in_turn = [warm[i % len(warm)] for i in range(self._requests)]
        phases["memory"] = await self._phase(in_turn, False)
        phases["new"] = await self._phase(cold, True)
        phases["disk"] = await self._phase(cold, False)
        for name in (*warm, *cold):
            await self._post("/v1/unload_lora_adapter", {"lora_name": name})
        return phases

    async def _phase(self, names: list[str], register: bool) -> Phase:
        await self._register("stream")
        times: list[list[float]] = [[], []]
        streams = [
            asyncio.create_task(self._generate(model, arrivals))
            for model, arrivals in zip(("stream", "base"), times, strict=True)
        ]
        phase = Phase([])
        try:
            await _until(lambda: min(map(len, times)) > WARM_UP_TOKENS)
            begin = time.perf_counter()
            for name in names:
                asked = time.perf_counter()
                if register:
                    await self._register(name)
                    phase.registration_ms.append(1000 * (time.perf_counter() - asked))
                phase.first_token_ms.append(1000 * (await self._request(name) - asked))
            if not names:
                enough = self._requests * (NEW_TOKENS + 2)
                await _until(lambda: min(map(len, times)) > WARM_UP_TOKENS + enough)
            end = time.perf_counter()
            if any(stream.done() for stream in streams):
                raise RuntimeError("a stream ended before its phase: raise STREAM_TOKENS")
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        for arrivals in times:
            phase.gaps_ms.extend(
                1000 * (after - before)
                for before, after in pairwise(arrivals)
                if begin <= after <= end
            )
        return phase

    async def _generate(self, model: str, arrivals: list[float]) -> None:
        async with aclosing(self._tokens(model, STREAM_PROMPT, STREAM_TOKENS)) as tokens:
            async for arrived in tokens:
                arrivals.append(arrived)

    async def _request(self, model: str) -> float:
        """Has a request answered; when its first token came."""
        first, *_ = [t async for t in self._tokens(model, PROMPT_TOKENS, NEW_TOKENS)]
        return first

    async def _tokens(self, model: str, prompt: int, count: int) -> AsyncIterator[float]:
        body = {
            "model": model,
            "prompt": [self._numbers.randrange(1000, 40000) for _ in range(prompt)],
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    if '"error"' in line:
                        raise RuntimeError(f"{model}: {line}")
                    yield time.perf_counter()

    async def _register(self, name: str) -> None:
        path = self._folder.parent / name
        if not path.exists():
            path.symlink_to(self._folder)
            await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    async def _post(self, path: str, body: dict[str, str]) -> None:
        response = await self._client.post(path, json=body)
        if response.is_error:
            raise RuntimeError(f"{path} {body}: {response.status_code} {response.text}")


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def run_engine(name: str, rounds: int, requests: int, scratch: Path) -> list[dict[str, Phase]]:
    """Starts a server and runs the rounds on it, after one short round to warm up."""
    from base_model import build_base_model
    from cpu_throughput import write_random_adapter

    from tests.serving.server import VllmServer

    model = build_base_model()
    config = json.loads((model / "config.json").read_text())
    adapter = write_random_adapter(scratch / "adapter", config, RANK, seed=0)
    arguments = (
        *("--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "2048", "--max-num-seqs", "8", "--no-enable-prefix-caching"),
        *("--enable-lora", "--max-loras", str(SLOTS), "--max-cpu-loras", str(HOST_PLACES)),
        *("--max-lora-rank", str(RANK)),
    )
    env = {**ENGINES[name], "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}

    async def run(url: str) -> list[dict[str, Phase]]:
        async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:
            await Load(client, adapter, 2).run_round(0)
            load = Load(client, adapter, requests)
            results = []
            for number in range(1, rounds + 1):
                results.append(await load.run_round(number))
                gaps = ", ".join(
                    f"{phase} {statistics.median(result.gaps_ms):.0f}"
                    for phase, result in results[-1].items()
                )
                print(f"{name}, round {number}, median gap in ms: {gaps}", flush=True)
            return results

    log = scratch / "vllm.log"
    with VllmServer(model, *arguments, log=log, env=env, start_timeout=300.0) as server:
        try:
            return asyncio.run(run(server.url))
        except Exception:
            print(server.log_tail(), file=sys.stderr)
            raise


def summary(rounds: list[dict[str, Phase]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by phase; relative ones from within a round."""

    def median(figure: Callable[[dict[str, Phase]], float]) -> float:
        return statistics.median(figure(result) for result in rounds)

    figures: dict[str, dict[str, float]] = {}
    for phase in PHASES:
        row = figures[phase] = {}
        for label, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            row[label] = median(lambda r, p=phase, s=share: r[p].quantile(s))
            for other in ("quiet", "slot"):
                row[f"{label}/{other}"] = median(
                    lambda r, p=phase, s=share, o=other: r[p].quantile(s) / r[o].quantile(s)
                )
        if phase != "quiet":
            row["first token"] = median(lambda r, p=phase: statistics.median(r[p].first_token_ms))
    return figures


def report(results: dict[str, list[dict[str, Phase]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Prints the table; returns its figures."""
    figures = {name: summary(rounds) for name, rounds in results.items()}
    columns = [*(f"{q}{o}" for q in ("p50", "p99", "max") for o in ("", "/quiet", "/slot"))]
    print(f"\n| engine | phase | {' | '.join(columns)} | first token |")
    print("|---" * (len(columns) + 3) + "|")
    for name, phases in figures.items():
        for phase, row in phases.items():
            cells = [f"{row[c]:.2f}" if "/" in c else f"{row[c]:.0f} ms" for c in columns]
            first = f"{row['first token']:.0f} ms" if "first token" in row else ""
            print(f"| {name} | {phase} | {' | '.join(cells)} | {first} |")
    if len(figures) == 2:
        print()
        for phase in PHASES[1:]:
            ours, stock = (figures[name][phase]["first token"] for name in ENGINES)
            print(f"first token, plugin / stock, {phase}: {ours / stock:.2f}")
    return figures


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the plugin")
    parser.add_argument("--stock-rounds", type=int, default=1, help="rounds of stock vLLM")
    parser.add_argument("--requests", type=int, default=12, help="beside the streams, a phase")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    counts = {"plugin": options.rounds, "stock": options.stock_rounds}
    results = {}
    for name, rounds in counts.items():
        if rounds:
            with tempfile.TemporaryDirectory() as scratch:
                results[name] = run_engine(name, rounds, options.requests, Path(scratch))
    figures = report(results)
    if options.json:
        raw = {
            name: [{p: asdict(v) for p, v in r.items()} for r in rs] for name, rs in results.items()
        }
        options.json.write_text(json.dumps({"figures": figures, "rounds": raw}, indent=2) + "\n")


if __name__ == "__main__":
    main()
