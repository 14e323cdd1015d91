"""What a wrong key costs an API server: processor time of one core, and memory.

    python benchmarks/wrong_keys.py [--keys 100000] [--tenants 1000] [--json FILE]

`look-up` hashes a key and compares it in constant time; `answer` is everything that the plugin does
for such a request, its 401 included; what uvicorn does with the bytes before and after comes on
top. Each is timed over all keys, all of them different; memory is what is left of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_multilora.integration.server.access import Access
from vllm_multilora.integration.server.access_middleware import AccessMiddleware
from vllm_multilora.tenants.keys import new_key, stored


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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()
