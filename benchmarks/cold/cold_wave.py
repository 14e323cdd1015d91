"""First tokens while clients ask for nothing but adapters that nobody has asked for before.

SmolLM2-135M in bfloat16 behind `vllm serve`, adapters of rank 8 on q, k, v and o in a directory, 16
slots, 64 places in host memory. Clients ask in a closed loop, each for the next adapter as soon as
it has its answer, until every adapter has been asked for once. No two requests share an adapter, so
every one waits for a load, on a server whose threads fill all processors.

The arms are this plugin as it is installed, with its store on a thread, with loads that the engine
waits for, and with a compiled model; and stock vLLM with its filesystem resolver, which compiles no
model with adapters on CPUs. All serve every wave in each round.

`beside` is another wave of four clients while two streams generate, one of the base model and one
of an adapter in a slot. Their gaps are compared with those beside the same requests once more, when
all these adapters are in host memory: what is left is what reading and checking files costs others.
Stock vLLM has no such phase.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.engine_loop import quantile
from benchmarks.loads.fleet import Fleet
from benchmarks.loads.server import vllm_server
from benchmarks.loads.smollm2 import base_model, model_config
from benchmarks.loads.streams import Phase, Streams, token_times

SLOTS, HOST_PLACES, RANK = 16, 64, 8
PROMPT_TOKENS, NEW_TOKENS = 50, 24
BESIDE_CLIENTS = 4
STREAM_ADAPTER = "stream"
ARMS: dict[str, list[str]] = {
    "default": [],
    "thread": ["--multilora-store", "thread"],
    "sync": ["--no-multilora-async-loading"],
    "compiled": ["--no-enforce-eager", "--compilation-config", '{"mode": 3}'],
    "stock": ["--no-multilora"],
}
CONTROL = "thread"


@dataclass(frozen=True)
class Wave:
    """What clients saw of one wave.

    Attributes:
        seconds: From the first request to the last answer.
        first_token_ms: Of each request.
    """

    seconds: float
    first_token_ms: list[float]


@dataclass(frozen=True)
class Found:
    """One arm's figures of one round: its waves by clients, and streams beside cold and warm."""

    waves: dict[int, Wave]
    beside: tuple[Phase, Phase] | None


@benchmark(
    workload="SmolLM2-135M in bfloat16 behind a server, 80 adapters of rank 8 on q, k, v and o, "
    "each asked for once in a closed loop of 4 and of 16 clients, requests of 50 + 24 tokens",
    control="the store on a thread, in the same round",
    figure="time until all are answered and time to the first token, over the thread store's",
    compares_to="stock vLLM with its filesystem resolver",
    quick={"rounds": 1, "stock_rounds": 0, "arms": "default", "clients": "4", "adapters": 8},
)
def cold_wave(
    arms: str = ",".join(ARMS),
    clients: str = "4,16",
    adapters: int = 80,
    rounds: int = 3,
    stock_rounds: int = 1,
) -> Iterable[Figure]:
    """First tokens while clients ask for nothing but cold adapters.

    Args:
        arms: Which of `default`, `thread`, `sync`, `compiled` and `stock`.
        clients: How many ask at a time, one wave each.
        adapters: In each wave.
        rounds: Of all arms but stock.
        stock_rounds: Of stock vLLM.
    """
    named, sizes = arms.split(","), [int(size) for size in clients.split(",")]
    rows: list[dict[str, Found]] = []
    for number in range(rounds):
        row = {}
        # Every second round backwards, so that no arm always has the machine after the same one.
        for arm in named if number % 2 == 0 else reversed(named):
            if arm != "stock" or number < stock_rounds:
                row[arm] = _served(arm, sizes, adapters)
                for size, wave in row[arm].waves.items():
                    _say(number, arm, size, wave)
        rows.append(row)
    for arm in named:
        for size in sizes:
            yield from _wave_figures(rows, arm, size)
        yield from _beside_figures(rows, arm)


def _served(arm: str, sizes: Sequence[int], adapters: int) -> Found:
    """Starts a server of an arm and sends it every wave."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        fleet = Fleet(scratch / "adapters", model_config(), RANK, projections, base_model())
        fleet.add(STREAM_ADAPTER)
        waves = {
            size: [fleet.add(f"cold-{size}-{n}").name for n in range(adapters)]
            for size in (*sizes, 0)  # 0: those of the wave beside streams
        }
        directory = str(fleet.folder)
        environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        options = [*ARMS[arm]]
        if arm == "stock":
            environment["VLLM_PLUGINS"] = "multilora,lora_filesystem_resolver"
            environment["VLLM_LORA_RESOLVER_CACHE_DIR"] = directory
        else:
            options += ["--multilora-adapter-dir", directory]
        with vllm_server(
            base_model(),
            *("--served-model-name", "base", "--dtype", "bfloat16", "--enforce-eager"),
            *("--max-model-len", "2048", "--max-num-seqs", str(max(*sizes, 4) + 2)),
            *("--no-enable-prefix-caching", "--enable-lora", "--max-loras", str(SLOTS)),
            *("--max-lora-rank", str(RANK), "--max-cpu-loras", str(HOST_PLACES)),
            *options,
            log=scratch / "vllm.log",
            env=environment,
            start_timeout=300.0,
        ) as server:
            try:
                return asyncio.run(_load(server.url, waves, with_streams=arm != "stock"))
            except Exception:
                print(server.log_tail(), file=sys.stderr)
                raise


async def _load(url: str, waves: dict[int, list[str]], *, with_streams: bool) -> Found:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=None, trust_env=False, limits=limits
    ) as client:
        await _ask(client, "base")
        await _ask(client, STREAM_ADAPTER)
        found = {size: await _wave(client, names, size) for size, names in waves.items() if size}
        if not with_streams:
            return Found(found, None)
        streams = Streams(client, (STREAM_ADAPTER, "base"), model_config()["vocab_size"])

        async def wave(phase: Phase) -> None:
            # No more than have a place in host memory: the second time none is read.
            names = waves[0][: HOST_PLACES // 2]
            phase.first_token_ms.extend((await _wave(client, names, BESIDE_CLIENTS)).first_token_ms)

        return Found(found, (await streams.phase(wave), await streams.phase(wave)))


async def _wave(client: httpx.AsyncClient, names: Sequence[str], clients: int) -> Wave:
    waiting, first_token_ms = iter(names), list[float]()

    async def one_client() -> None:
        for name in waiting:
            first_token_ms.append(await _ask(client, name))

    begin = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(clients)))
    return Wave(time.perf_counter() - begin, first_token_ms)


async def _ask(client: httpx.AsyncClient, model: str) -> float:
    """Has a request answered; milliseconds to its first token."""
    body = {
        "model": model,
        "prompt": [next(_PROMPT) for _ in range(PROMPT_TOKENS)],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    begin = time.perf_counter()
    first, *_ = [at async for at in token_times(client, body)]
    return 1000 * (first - begin)


def _tokens() -> Iterator[int]:
    """Numbers of tokens, in an order that repeats late."""
    for number in itertools.count():
        yield 1000 + number * 7919 % 39_000


_PROMPT = _tokens()


def _say(number: int, arm: str, clients: int, wave: Wave) -> None:
    median, p90 = statistics.median(wave.first_token_ms), quantile(wave.first_token_ms, 0.9)
    print(
        f"round {number + 1}, {arm}, {clients} at a time: all in {wave.seconds:.1f} s, first token "
        f"{median:.0f} ms, p90 {p90:.0f} ms",
        file=sys.stderr,
        flush=True,
    )


def _wave_figures(rows: Sequence[dict[str, Found]], arm: str, clients: int) -> Iterable[Figure]:
    measures = {
        "all in, s": lambda wave: wave.seconds,
        "first token, median, ms": lambda wave: statistics.median(wave.first_token_ms),
        "p90, ms": lambda wave: quantile(wave.first_token_ms, 0.9),
    }
    case = f"{arm}, {clients} at a time"
    for label, measure in measures.items():
        if values := [measure(row[arm].waves[clients]) for row in rows if arm in row]:
            yield Figure(case, label, values)
        pairs = [(row[arm], row[CONTROL]) for row in rows if arm in row and CONTROL in row]
        if pairs and arm != CONTROL:
            ratios = [
                measure(found.waves[clients]) / measure(control.waves[clients])
                for found, control in pairs
            ]
            yield Figure(case, f"{label.rpartition(',')[0]} / {CONTROL}", ratios)


def _beside_figures(rows: Sequence[dict[str, Found]], arm: str) -> Iterable[Figure]:
    found = [row[arm].beside for row in rows if arm in row]
    pairs = [pair for pair in found if pair is not None]
    if not pairs:
        return
    case = f"{arm}, streams beside"
    for label, share in {"gap p50": 0.5, "gap p99": 0.99, "slowest gap": 1.0}.items():
        yield Figure(case, f"{label}, ms", [cold.quantile(share) for cold, _ in pairs])
        ratios = [cold.quantile(share) / warm.quantile(share) for cold, warm in pairs]
        yield Figure(case, f"{label} / warm", ratios)
