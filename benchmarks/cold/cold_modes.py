"""What streams notice of registrations, first uses and hostile adapters.

As in `cold_loads.py`, but with a model of 8 layers, 2,048 wide, in bfloat16, adapters of 47 MB, and
this plugin alone. Beside `quiet` and `slot`, which is the same requests for an adapter that is in a
slot:

- `registrations`: adapters are registered one after another, and each is asked for once
- `first-use`: adapters lie in a `--multilora-adapter-dir`, and each is asked for once
- `hostile`: adapters are registered that are made to keep whoever checks them busy: headers of
  40 MiB, 10,000 patterns, an expression of 4 MiB, a FIFO for a configuration, deep nesting. What
  the server answers is shown; nobody asks for them, so that `quiet` is what they are compared with
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import httpx

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.fleet import MODEL, RANK, VOCABULARY, WEIGHTS, Fleet, write_base
from benchmarks.loads.server import vllm_server
from benchmarks.loads.streams import Phase, Streams

SLOTS = 4
LOAD_TIMEOUT_S = 10.0
HOSTILE_A_REQUEST = 5
"""Hostile registrations for each request of other phases, so that theirs is about as long."""
MODES = ("registrations", "first-use", "hostile")
_SHARES = {"p50": 0.5, "p99": 0.99, "slowest": 1.0}

Rounds = list[dict[str, Phase]]


class _Server:
    """The benchmark's requests to one server.

    Args:
        client: Of the server.
        folder: Where adapters are; `directory` in it is the server's adapter directory.
        requests: Beside the streams, per phase.
    """

    def __init__(self, client: httpx.AsyncClient, folder: Path, requests: int) -> None:
        self._streams = Streams(client, ("stream", "base"), VOCABULARY)
        self._fleet = Fleet(folder / "registered", MODEL, RANK)
        self._directory = folder / "directory"
        self._requests = requests
        self.megabytes = (self._fleet.add("stream") / WEIGHTS).stat().st_size / 1e6
        self._hostile = self._fleet.add_hostile()

    async def run(self, modes: Sequence[str], rounds: int) -> Rounds:
        """Rounds of the two phases to compare with and one of each mode; one more warms up."""
        await self._streams.register("stream", str(self._fleet.folder / "stream"))
        beside = {
            "registrations": self._registrations,
            "first-use": self._first_use,
            "hostile": self._registered_hostile,
        }
        found = []
        for number in range(rounds + 1):
            result = {"quiet": await self._streams.quiet(self._requests)}
            result["slot"] = await self._in_slot()
            for mode in modes:
                result[mode] = await beside[mode](number)
            gaps = ", ".join(f"{m} {statistics.median(p.gaps_ms):.0f}" for m, p in result.items())
            print(f"round {number}, median gap in ms: {gaps}", flush=True)
            found.append(result)
        return found[1:]

    async def _in_slot(self) -> Phase:
        """The same requests without any loading: what their own tokens cost the streams."""

        async def ask(phase: Phase) -> None:
            for _ in range(self._requests):
                begin = time.perf_counter()
                phase.first_token_ms.append(1000 * (await self._streams.request("stream") - begin))

        return await self._streams.phase(ask)

    async def _registrations(self, number: int) -> Phase:
        names = [f"new-{number}-{i}" for i in range(self._requests)]
        for name in names:
            self._fleet.add(name)

        async def register_and_ask(phase: Phase) -> None:
            for name in names:
                begin = time.perf_counter()
                await self._streams.register(name, str(self._fleet.folder / name))
                phase.registration_ms.append(1000 * (time.perf_counter() - begin))
                phase.first_token_ms.append(1000 * (await self._streams.request(name) - begin))

        phase = await self._streams.phase(register_and_ask)
        for name in names:
            await self._streams.unload(name)
            self._fleet.remove(name)
        return phase

    async def _first_use(self, number: int) -> Phase:
        names = [f"used-{number}-{i}" for i in range(self._requests)]
        for name in names:
            self._fleet.add(name, self._directory)

        async def ask(phase: Phase) -> None:
            for name in names:
                begin = time.perf_counter()
                phase.first_token_ms.append(1000 * (await self._streams.request(name) - begin))

        return await self._streams.phase(ask)

    async def _registered_hostile(self, number: int) -> Phase:
        async def register(phase: Phase) -> None:
            count = HOSTILE_A_REQUEST * self._requests
            turns = itertools.islice(itertools.cycle(self._hostile.items()), count)
            for turn, (name, path) in enumerate(turns):
                begin = time.perf_counter()
                response = await self._streams.post(
                    "/v1/load_lora_adapter",
                    {"lora_name": f"{name}-{number}-{turn}", "lora_path": str(path)},
                )
                phase.registration_ms.append(1000 * (time.perf_counter() - begin))
                phase.answers[name] = response.status_code

        return await self._streams.phase(register)


@benchmark(
    workload="a Llama of 8 layers, 2,048 wide, in bfloat16; two streams, and beside them 12 "
    "adapters of 47 MB that are registered or used for the first time, or 60 hostile ones",
    control="the streams beside the same requests for an adapter in a slot, in the same round; for "
    "hostile ones, without any requests",
    figure="the streams' time from token to token over that",
    compares_to="1, where nothing is noticed",
    quick={"modes": "first-use", "rounds": 1, "requests": 2},
)
def cold_modes(
    modes: str = ",".join(MODES), rounds: int = 3, requests: int = 12
) -> Iterable[Figure]:
    """What streams notice of registrations, first uses and hostile adapters."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base = write_base(scratch / "base")
        (scratch / "directory").mkdir()
        with vllm_server(
            base,
            *("--served-model-name", "base", "--load-format", "dummy", "--dtype", "bfloat16"),
            *("--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"),
            *("--no-enable-prefix-caching", "--enable-lora", "--max-loras", str(SLOTS)),
            *("--max-lora-rank", str(RANK), "--multilora-adapter-dir", str(scratch / "directory")),
            *("--multilora-load-timeout-s", str(LOAD_TIMEOUT_S)),
            log=scratch / "vllm.log",
            env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
            start_timeout=300.0,
        ) as server:

            async def run() -> Rounds:
                async with httpx.AsyncClient(
                    base_url=server.url, timeout=None, trust_env=False
                ) as client:
                    load = _Server(client, scratch, requests)
                    return await load.run(modes.split(","), rounds)

            try:
                found = asyncio.run(run())
            except Exception:
                print(server.log_tail(), file=sys.stderr)
                raise
    yield from figures_of(modes.split(","), found)


def figures_of(modes: Sequence[str], rounds: Rounds) -> Iterable[Figure]:
    """The figures; relative ones are from within a round."""

    def values(figure: Callable[[dict[str, Phase]], float]) -> list[float]:
        return [figure(result) for result in rounds]

    for mode in ("quiet", "slot", *modes):
        control = "quiet" if mode in ("slot", "hostile") else "slot"
        for label, share in _SHARES.items():
            yield Figure(mode, f"{label}, ms", values(lambda r, m=mode, s=share: r[m].quantile(s)))
            if mode == "quiet":
                continue
            yield Figure(
                mode,
                f"{label} / {control}",
                values(lambda r, m=mode, s=share, c=control: r[m].quantile(s) / r[c].quantile(s)),
            )
        for label, of in (
            ("registration, ms", lambda phase: phase.registration_ms),
            ("first token, ms", lambda phase: phase.first_token_ms),
        ):
            if of(rounds[0][mode]):
                medians = values(lambda r, m=mode, o=of: statistics.median(o(r[m])))
                yield Figure(mode, label, medians)
    for name, status in rounds[-1].get("hostile", Phase([])).answers.items():
        print(f"{name}: answered with {status}")
