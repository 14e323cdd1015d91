"""What running requests notice of other tenants' cold adapters.

`vllm serve`, where two streams, one with an adapter and one of the base model, generate all the
time. Beside them, 12 requests come one after another, each for another tenant's adapter. Reported
is the time between two tokens of the streams (both taken together), relative to a phase of the
same round and server without other requests, and the requests' time to first token. Every adapter
has files of its own with bytes of its own, in the page cache. Medians over rounds; one server at a
time.

SmolLM2-135M in float32, adapters of rank 64 (78 MB), this plugin
and stock vLLM. The phases differ in where the other tenants' adapters are:

- `quiet`: no requests beside the streams
- `slot`: in a slot; what the requests' own prompts and tokens cost, and nothing else
- `memory`: in host memory, not in a slot: copied into one first
- `new`: unknown; registered by `/v1/load_lora_adapter`, then asked for; the time to first token is
  from the registration on
- `disk`: registered and not in memory, as most of a large fleet
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.fleet import Fleet
from benchmarks.loads.server import vllm_server
from benchmarks.loads.smollm2 import base_model, model_config
from benchmarks.loads.streams import Phase, Streams

ROOT = Path(__file__).parents[2]

RANK = 64
SLOTS, HOST_PLACES = 3, 6
VOCABULARY = 40_000  # of SmolLM2's tokens
PHASES = ("quiet", "slot", "memory", "new", "disk")
ENGINES = {"plugin": {}, "stock": {"VLLM_PLUGINS": "none"}}


class Load:
    """The requests of a benchmark run, sent to one server.

    Args:
        client: Of the server.
        fleet: Where adapters are written.
        requests: Beside the streams, per phase.
    """

    def __init__(self, client: httpx.AsyncClient, fleet: Fleet, requests: int) -> None:
        self._streams = Streams(client, ("stream", "base"), VOCABULARY)
        self._fleet = fleet
        self._requests = requests

    async def begin(self) -> None:
        """Registers the streams' adapter."""
        await self._register("stream")

    async def run_round(self, number: int) -> dict[str, Phase]:
        """All phases, with adapters that the server has not seen before."""
        warm = [f"warm-{number}-{i}" for i in range(HOST_PLACES - 1)]
        cold = [f"cold-{number}-{i}" for i in range(self._requests)]
        for name in (*warm, *cold):
            self._fleet.add(name)
        phases = {"quiet": await self._streams.quiet(self._requests)}
        for name in warm:
            await self._register(name)
        await self._streams.request(warm[0])
        phases["slot"] = await self._phase([warm[0]] * self._requests)
        for name in warm:
            await self._streams.request(name)
        in_turn = [warm[i % len(warm)] for i in range(self._requests)]
        phases["memory"] = await self._phase(in_turn)
        phases["new"] = await self._phase(cold, register=True)
        phases["disk"] = await self._phase(cold)
        for name in (*warm, *cold):
            await self._streams.unload(name)
            self._fleet.remove(name)
        return phases

    async def _phase(self, names: list[str], *, register: bool = False) -> Phase:
        async def ask(phase: Phase) -> None:
            for name in names:
                asked = time.perf_counter()
                if register:
                    await self._register(name)
                    phase.registration_ms.append(1000 * (time.perf_counter() - asked))
                phase.first_token_ms.append(1000 * (await self._streams.request(name) - asked))

        return await self._streams.phase(ask)

    async def _register(self, name: str) -> None:
        await self._streams.register(name, str(self._fleet.folder / name))


def run_engine(name: str, rounds: int, requests: int, scratch: Path) -> list[dict[str, Phase]]:
    """Starts a server and runs the rounds on it, after one short round to warm up."""
    model = base_model()
    fleet = Fleet(scratch / "adapters", model_config(), RANK)
    fleet.add("stream")
    arguments = (
        *("--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "2048", "--max-num-seqs", "8", "--no-enable-prefix-caching"),
        *("--enable-lora", "--max-loras", str(SLOTS), "--max-cpu-loras", str(HOST_PLACES)),
        *("--max-lora-rank", str(RANK)),
    )
    env = {**ENGINES[name], "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}

    async def run(url: str) -> list[dict[str, Phase]]:
        async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:
            warm_up, load = Load(client, fleet, 2), Load(client, fleet, requests)
            await load.begin()
            await warm_up.run_round(0)
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
    with vllm_server(model, *arguments, log=log, env=env, start_timeout=300.0) as server:
        try:
            return asyncio.run(run(server.url))
        except Exception:
            print(server.log_tail(), file=sys.stderr)
            raise


def figures_of(name: str, rounds: list[dict[str, Phase]]) -> Iterable[Figure]:
    """The figures of one engine; relative ones are from within a round."""

    def values(figure: Callable[[dict[str, Phase]], float]) -> list[float]:
        return [figure(result) for result in rounds]

    for phase in PHASES:
        case = f"{name}, {phase}"
        for label, share in (("p50", 0.5), ("p99", 0.99), ("slowest", 1.0)):
            yield Figure(case, f"{label}, ms", values(lambda r, p=phase, s=share: r[p].quantile(s)))
            yield Figure(
                case,
                f"{label} / quiet",
                values(lambda r, p=phase, s=share: r[p].quantile(s) / r["quiet"].quantile(s)),
            )
        if phase != "quiet":
            first = values(lambda r, p=phase: statistics.median(r[p].first_token_ms))
            yield Figure(case, "first token, ms", first)


@benchmark(
    workload="SmolLM2-135M in float32; two streams, and beside them 12 requests for adapters of 78 "
    "MB that are in slots, in host memory, on disk, or unknown",
    control="the streams without other requests, in the same round, and stock vLLM",
    figure="the streams' time from token to token over that without other requests",
    compares_to="1, where nothing is noticed, and stock vLLM",
    quick={"rounds": 1, "stock_rounds": 0, "requests": 2},
)
def cold_loads(rounds: int = 3, stock_rounds: int = 1, requests: int = 12) -> Iterable[Figure]:
    """What running requests notice of other tenants' cold adapters.

    Args:
        rounds: Of the plugin.
        stock_rounds: Of stock vLLM.
        requests: Beside the streams, in each phase.
    """
    for name, count in (("plugin", rounds), ("stock", stock_rounds)):
        if count:
            with tempfile.TemporaryDirectory() as scratch:
                yield from figures_of(name, run_engine(name, count, requests, Path(scratch)))
