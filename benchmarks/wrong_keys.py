"""What a wrong key costs an API server: processor time of one core, and memory.

    python benchmarks/wrong_keys.py [--keys 100000] [--tenants 1000] [--json FILE]
    python benchmarks/wrong_keys.py --http [--seconds 10] [--rounds 3]

`look-up` hashes a key and compares it in constant time; `answer` is everything that the plugin does
for such a request, its 401 included; what uvicorn does with the bytes before and after comes on
top. Each is timed over all keys, all of them different; memory is what is left of them.

With `--http` a server with a tiny Llama is flooded over a few connections, and a tenant's requests
are timed beside that and without it, turn by turn. All requests of the flood are made beforehand,
each with a key of its own, and sent hundreds in a piece; answers are counted, not read. What the
flood and the server's process have of the processor says which of the two could not do more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx
import psutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

sys.path.insert(0, str(Path(__file__).parents[1]))

from vllm_multilora.integration.server.access import Access
from vllm_multilora.integration.server.access_middleware import AccessMiddleware
from vllm_multilora.tenants.keys import new_key, stored

TENANT_KEY = "sk-a-tenant-0123456789abcdef"
TOGETHER = 200  # requests in a piece
ENDING = b"HTTP/1.1 401 "


def measured(work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of processor time, and bytes that are left in memory; in two runs."""
    begun = time.process_time()
    work()
    seconds = time.process_time() - begun
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    work()
    left = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return seconds, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--tenants", type=int, default=1_000)
    parser.add_argument("--http", action="store_true", help="flood a server instead")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a phase, with --http")
    parser.add_argument("--rounds", type=int, default=3, help="with --http")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.http:
        found = over_http(options)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2))
        return
    tenants = {f"t{number}": {"keys": [stored(new_key())]} for number in range(options.tenants)}
    wrong = [f"sk-{secrets.token_urlsafe(32)}" for _ in range(options.keys)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"tenants": tenants}, file)
        file.flush()
        access = Access(admin_keys=[new_key()], tenants_path=file.name)

    def look_up() -> None:
        for key in wrong:
            access.caller(key)

    results = {
        "look-up": measured(look_up),
        "answer": measured(lambda: asyncio.run(ask(access, wrong))),
    }
    found = {}
    for name, (seconds, left) in results.items():
        rate = len(wrong) / seconds
        found[name] = {"per_second_of_a_core": round(rate), "bytes_left": left}
        cost = f"{1e6 * seconds / len(wrong):6.1f} us  {rate:9,.0f} a second"
        print(f"{name:8}  {cost}  {left:,} bytes left")
    if options.json:
        options.json.write_text(json.dumps({"keys": len(wrong), **found}, indent=2))
    if any(len(wrong) / seconds < 10_000 for seconds, _ in results.values()):
        sys.exit("fewer than 10,000 wrong keys a second of one core")


async def ask(access: Access, keys: list[str]) -> None:
    """Sends a request with each key through the door, with nothing behind it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("a wrong key was let in")

    async def receive() -> Any:
        raise AssertionError("a body was read")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 401

    door = AccessMiddleware(app, access)
    for key in keys:
        headers = [(b"host", b"test"), (b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        await door(scope, receive, send)


def over_http(options: argparse.Namespace) -> dict[str, list[float]]:
    """Floods a server; prints, and returns by round, rates, processor time and a tenant's times."""
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
            found = flooded(server.port, psutil.Process(server.pid), options)
    print("| | median of all rounds | least | most |\n|---|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):,.2f} | {min(values):,.2f} ", end="")
        print(f"| {max(values):,.2f} |")
    return found


def flooded(
    port: int, server: psutil.Process, options: argparse.Namespace
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    ask_for(port, 2.0)
    memory = 0
    for number in range(options.rounds + 1):
        quiet = ask_for(port, options.seconds)
        over = multiprocessing.Event()
        answered = multiprocessing.Value("q", 0)
        flood = multiprocessing.Process(target=send_wrong_keys, args=(port, over, answered))
        flood.start()
        while not answered.value:
            time.sleep(0.01)
        generator = psutil.Process(flood.pid)
        begun, before = time.perf_counter(), answered.value
        spent = [sum(process.cpu_times()[:2]) for process in (server, generator)]
        beside = ask_for(port, options.seconds)
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


if __name__ == "__main__":
    main()
