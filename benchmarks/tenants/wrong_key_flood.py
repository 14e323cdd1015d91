"""What a flood of wrong keys over HTTP costs an API server, and a tenant beside it.

A server with a tiny Llama is flooded over 40 connections, each of which always has a request more
than is answered, and a tenant's requests are timed beside that and without it, turn by turn. The
API server's part of a core is what the flood alone takes, while nobody else asks.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import httpx
import psutil

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.server import vllm_server
from vllm_multilora.tenants.keys import stored

TENANT_KEY = "sk-a-tenant-0123456789abcdef"


def flooded(
    port: int, server: psutil.Process, seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Rates, processor time and a tenant's times, by round."""
    from tests.attacks.flood import Flood
    from vllm_multilora.gateway.limits.tenant_turns import STRANGERS_PER_MINUTE

    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    ask_for(port, 2.0)
    memory = 0
    for number in range(rounds + 1):
        quiet = ask_for(port, seconds)
        with Flood(port) as flood:
            # Those that are answered at once after a pause: a minute's worth in the first round.
            while flood.answered < (200 if number else STRANGERS_PER_MINUTE):
                time.sleep(0.01)
            begun, before = time.perf_counter(), flood.answered
            idle = sum(server.cpu_times()[:2])
            time.sleep(seconds)
            note("the API server's part of a core", (sum(server.cpu_times()[:2]) - idle) / seconds)
            beside = ask_for(port, seconds)
            rate = (flood.answered - before) / (time.perf_counter() - begun)
        if not number:  # warms up, and does not count
            memory = server.memory_info().rss
            found.clear()
            continue
        note("wrong keys answered a second", rate)
        for name, share in (("median", 0.5), ("95th percentile", 0.95)):
            with_it, without = (sorted(each)[int(share * len(each))] for each in (beside, quiet))
            note(f"a tenant's answer, {name}, ms", 1000 * with_it)
            note(f"a tenant's answer, {name}, against quiet", with_it / without)
    note("MiB that the API server has grown by", (server.memory_info().rss - memory) / 2**20)
    return found


def ask_for(port: int, seconds: float) -> list[float]:
    """A tenant asks for this long; seconds until each answer was there."""
    taken = []
    headers = {"authorization": f"Bearer {TENANT_KEY}"}
    body = {"model": "base", "prompt": [5, 6, 7, 8], "max_tokens": 4, "ignore_eos": True}
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as client:
        end = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < end:
            client.post("/v1/completions", json=body).raise_for_status()
            taken.append(time.perf_counter() - begun)
    return taken


@benchmark(
    workload="wrong keys over HTTP, as many as 40 connections bring, and one tenant's requests",
    control="the tenant's requests without the flood, in the same round",
    figure="wrong keys answered a second, and the tenant's time beside them over that without",
    compares_to="1, where nothing is noticed",
    quick={"seconds": 2.0, "rounds": 1},
)
def wrong_key_flood(seconds: float = 10.0, rounds: int = 3) -> Iterable[Figure]:
    """What a flood of wrong keys over HTTP costs an API server, and a tenant beside it.

    Args:
        seconds: Of each phase.
        rounds: Of a phase without the flood, one of the flood alone, and one beside it.
    """
    from tests.serving.models.tiny_models import write_llama

    with tempfile.TemporaryDirectory() as scratch:
        tenants = Path(scratch, "tenants.json")
        tenant = {"keys": [stored(TENANT_KEY)], "base_model": True}
        tenants.write_text(json.dumps({"tenants": {"tenant": tenant}}))
        with vllm_server(
            write_llama(Path(scratch, "base")),
            *("--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "128", "--enable-lora", "--max-loras", "1"),
            *("--multilora-tenants", str(tenants)),
            log=Path(scratch, "vllm.log"),
            start_timeout=600.0,
        ) as server:
            found = flooded(server.port, psutil.Process(server.pid), seconds, rounds)
    for name, values in found.items():
        yield Figure("", name, values)
