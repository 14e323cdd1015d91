"""What running requests notice of other tenants' cold adapters.

    python benchmarks/cold_loads.py [--rounds 3] [--stock-rounds 1] [--json FILE]
    python benchmarks/cold_loads.py --registrations --first-use --hostile [--rounds 3]

`vllm serve`, where two streams, one with an adapter and one of the base model, generate all the
time. Beside them, 12 requests come one after another, each for another tenant's adapter. Reported
is the time between two tokens of the streams (both taken together), relative to a phase of the
same round and server without other requests, and the requests' time to first token. Every adapter
has files of its own with bytes of its own, in the page cache. Medians over rounds; one server at a
time.

Without any of the three flags: SmolLM2-135M in float32, adapters of rank 64 (78 MB), this plugin
and stock vLLM. The phases differ in where the other tenants' adapters are:

- `quiet`: no requests beside the streams
- `slot`: in a slot; what the requests' own prompts and tokens cost, and nothing else
- `memory`: in host memory, not in a slot: copied into one first
- `new`: unknown; registered by `/v1/load_lora_adapter`, then asked for; the time to first token is
  from the registration on
- `disk`: registered and not in memory, as most of a large fleet

With them: a model of 8 layers, 2,048 wide, in bfloat16, adapters of 47 MB, this plugin alone,
beside `quiet` and `slot`, which is the same requests for an adapter that is in a slot:

- `--registrations`: adapters are registered one after another, and each is asked for once
- `--first-use`: adapters lie in a `--multilora-adapter-dir`, and each is asked for once
- `--hostile`: adapters are registered that are made to keep whoever checks them busy: headers of
  40 MiB, 10,000 patterns, an expression of 4 MiB, a FIFO for a configuration, deep nesting. What
  the server answers is shown; nobody asks for them
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import httpx
from cold_fleet import Fleet
from cold_modes import MODES, run_modes
from streams import Phase, Streams

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "demo")]

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
    from base_model import build_base_model

    from tests.serving.server import VllmServer

    model = build_base_model()
    config = json.loads((model / "config.json").read_text())
    fleet = Fleet(scratch / "adapters", config, RANK)
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
    for mode, what in MODES.items():
        parser.add_argument(f"--{mode}", action="store_true", help=what)
    options = parser.parse_args()
    if modes := [mode for mode in MODES if getattr(options, mode.replace("-", "_"))]:
        run_modes(modes, options.rounds, options.requests, options.json)
        return
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
