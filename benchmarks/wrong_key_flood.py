"""What a flood of wrong keys over HTTP costs an API server, and a tenant beside it.

A server with a tiny Llama is flooded over one connection, and a tenant's requests are timed beside
that and without it, turn by turn. All requests of the flood are made beforehand, each with a key of
its own, and sent hundreds in a piece; answers are counted, not read. What the flood and the
server's process have of the processor says which of the two could not do more.
"""

from __future__ import annotations

import json
import multiprocessing
import secrets
import socket
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.harness.registry import Figure, benchmark
from vllm_multilora.tenants.keys import stored

TENANT_KEY = "sk-a-tenant-0123456789abcdef"
TOGETHER = 200  # requests in a piece
ENDING = b"HTTP/1.1 401 "


def flooded(
    port: int, server: psutil.Process, seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Rates, processor time and a tenant's times, by round."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    ask_for(port, 2.0)
    memory = 0
    for number in range(rounds + 1):
        quiet = ask_for(port, seconds)
        over = multiprocessing.Event()
        answered = multiprocessing.Value("q", 0)
        flood = multiprocessing.Process(target=send_wrong_keys, args=(port, over, answered))
        flood.start()
        while not answered.value:
            time.sleep(0.01)
        generator = psutil.Process(flood.pid)
        begun, before = time.perf_counter(), answered.value
        spent = [sum(process.cpu_times()[:2]) for process in (server, generator)]
        beside = ask_for(port, seconds)
        taken, count = time.perf_counter() - begun, answered.value - before
        spent = [
            sum(process.cpu_times()[:2]) - had
            for process, had in zip((server, generator), spent, strict=True)
        ]
        over.set()
        flood.join()
        if flood.exitcode:
            raise RuntimeError("the flood ended early: the server has closed its connection")
        if not number:  # warms up, and does not count
            memory = server.memory_info().rss
            continue
        note("wrong keys answered a second", count / taken)
        note("the API server's part of a core", spent[0] / taken)
        note("the flood's part of a core", spent[1] / taken)
        note("wrong keys for a second of the API server's processor time", count / spent[0])
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


def send_wrong_keys(port: int, over: Event, answered: Any) -> None:
    """Sends pieces of requests over one connection until it is over, and counts their answers."""
    pieces = [
        b"".join(
            b"GET /v1/models HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer sk-%s\r\n\r\n"
            % secrets.token_hex(16).encode()
            for _ in range(TOGETHER)
        )
        for _ in range(500)
    ]
    number, left = 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(pieces[0])
        while not over.is_set():
            # One piece ahead, so that the server always has some to read.
            number += 1
            connection.sendall(pieces[number % len(pieces)])
            expected = TOGETHER
            while expected:
                part = connection.recv(1 << 18)
                if not part:
                    raise ConnectionError("the server has closed the connection")
                left += part
                count = min(expected, left.count(ENDING))
                expected -= count
                left = left.rpartition(ENDING)[2] if count else left
                answered.value += count


@benchmark(
    workload="wrong keys over HTTP, as fast as the server answers them, and one tenant's requests",
    control="the tenant's requests without the flood, in the same round",
    figure="wrong keys answered a second, and the tenant's time beside them over that without",
    compares_to="1, where nothing is noticed",
    quick={"seconds": 2.0, "rounds": 1},
)
def wrong_key_flood(seconds: float = 10.0, rounds: int = 3) -> Iterable[Figure]:
    """What a flood of wrong keys over HTTP costs an API server, and a tenant beside it.

    Args:
        seconds: Of each phase.
        rounds: Of a phase without the flood and one beside it.
    """
    from tests.serving.server import VllmServer
    from tests.serving.tiny_models import write_llama

    with tempfile.TemporaryDirectory() as scratch:
        tenants = Path(scratch, "tenants.json")
        tenant = {"keys": [stored(TENANT_KEY)], "base_model": True}
        tenants.write_text(json.dumps({"tenants": {"tenant": tenant}}))
        with VllmServer(
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
