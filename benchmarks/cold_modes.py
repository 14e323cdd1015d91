"""What streams notice of registrations, first uses and hostile adapters; see `cold_loads.py`."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import httpx
from cold_fleet import MODEL, RANK, VOCABULARY, WEIGHTS, Fleet, write_base
from streams import Phase, Streams

SLOTS = 4
LOAD_TIMEOUT_S = 10.0
MODES = {
    "registrations": "12 new adapters of 47 MB, registered one after another and asked for once",
    "first-use": "12 new adapters of 47 MB in an adapter directory, each asked for once",
    "hostile": "registrations of adapters that are made to keep their checks busy",
}
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
            for name, path in self._hostile.items():
                begin = time.perf_counter()
                response = await self._streams.post(
                    "/v1/load_lora_adapter",
                    {"lora_name": f"{name}-{number}", "lora_path": str(path)},
                )
                phase.registration_ms.append(1000 * (time.perf_counter() - begin))
                phase.answers[name] = response.status_code

        return await self._streams.phase(register)


def run_modes(modes: Sequence[str], rounds: int, requests: int, json_file: Path | None) -> None:
    """Starts a server, runs the modes on it and prints their table."""
    from tests.serving.server import VllmServer

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base = write_base(scratch / "base")
        (scratch / "directory").mkdir()
        with VllmServer(
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

            async def run() -> tuple[Rounds, float]:
                async with httpx.AsyncClient(
                    base_url=server.url, timeout=None, trust_env=False
                ) as client:
                    load = _Server(client, scratch, requests)
                    return await load.run(modes, rounds), load.megabytes

            try:
                found, megabytes = asyncio.run(run())
            except Exception:
                print(server.log_tail(), file=sys.stderr)
                raise
    print(f"\nadapters of {megabytes:.1f} MB")
    figures = report(modes, found)
    if json_file:
        raw = [{mode: asdict(phase) for mode, phase in result.items()} for result in found]
        json_file.write_text(json.dumps({"figures": figures, "rounds": raw}, indent=2) + "\n")


def report(modes: Sequence[str], rounds: Rounds) -> dict[str, dict[str, float]]:
    """Prints the table: medians over rounds, ratios from within a round; returns its figures."""
    figures: dict[str, dict[str, float]] = {}
    columns = [f"{label}{part}" for label in _SHARES for part in ("", "/quiet", "/slot")]
    print(f"\n| beside the streams | {' | '.join(columns)} | registration | first token |")
    print("|---" * (len(columns) + 3) + "|")
    for mode in ("quiet", "slot", *modes):
        row = figures[mode] = _row(mode, rounds)
        cells = [f"{row[c]:.2f}" if "/" in c else f"{row[c]:.0f} ms" for c in columns]
        for extra in ("registration", "first token"):
            cells.append(f"{row[extra]:.0f} ms" if extra in row else "")
        print(f"| {mode} | {' | '.join(cells)} |")
    for name, status in rounds[-1].get("hostile", Phase([])).answers.items():
        print(f"{name}: answered with {status}")
    return figures


def _row(mode: str, rounds: Rounds) -> dict[str, float]:
    def median(figure: Callable[[dict[str, Phase]], float]) -> float:
        return statistics.median(map(figure, rounds))

    row = {}
    for label, share in _SHARES.items():
        row[label] = median(lambda r, s=share: r[mode].quantile(s))
        for other in ("quiet", "slot"):
            row[f"{label}/{other}"] = median(
                lambda r, s=share, o=other: r[mode].quantile(s) / r[o].quantile(s)
            )
    for label, of in (
        ("registration", lambda phase: phase.registration_ms),
        ("first token", lambda phase: phase.first_token_ms),
    ):
        if of(rounds[0][mode]):
            row[label] = median(lambda r, o=of: statistics.median(o(r[mode])))
    return row
