"""What a wrong key costs an API server: processor time of one core, and memory.

`look-up` hashes a key and compares it in constant time; `answer` is everything that the plugin does
for such a request, its 401 included; what uvicorn does with the bytes before and after comes on
top. Each is timed over all keys, all of them different; memory is what is left of them.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from benchmarks.harness.registry import Figure, benchmark
from vllm_multilora.tenants.keys import new_key, stored

if TYPE_CHECKING:
    from vllm_multilora.gateway.keys.access import Access


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


@benchmark(
    workload="wrong keys, all of them different, beside a thousand tenants",
    control="the look-up alone (`look-up`) of what the plugin does for such a request (`answer`)",
    figure="wrong keys a second of one core, and bytes that are left of them",
    compares_to="10,000 a second, the limit",
    quick={"keys": 2_000, "tenants": 10},
)
def wrong_keys(keys: int = 100_000, tenants: int = 1_000) -> Iterable[Figure]:
    """What a wrong key costs an API server: processor time of one core, and memory."""
    from vllm_multilora.gateway.keys.access import Access

    known = {f"t{number}": {"keys": [stored(new_key())]} for number in range(tenants)}
    wrong = [f"sk-{secrets.token_urlsafe(32)}" for _ in range(keys)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"tenants": known}, file)
        file.flush()
        access = Access(admin_keys=[new_key()], tenants_path=file.name)

    def look_up() -> None:
        for key in wrong:
            access.caller(key)

    results = {
        "look-up": measured(look_up),
        "answer": measured(lambda: asyncio.run(ask(access, wrong))),
    }
    for name, (seconds, left) in results.items():
        yield Figure(name, "µs of a core", [1e6 * seconds / len(wrong)])
        yield Figure(name, "a second of a core", [len(wrong) / seconds])
        yield Figure(name, "bytes left", [left])
    if any(len(wrong) / seconds < 10_000 for seconds, _ in results.values()):
        raise SystemExit("fewer than 10,000 wrong keys a second of one core")


async def ask(access: Access, keys: list[str]) -> None:
    """Sends a request with each key through the door, with nothing behind it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("a wrong key was let in")

    async def receive() -> Any:
        raise AssertionError("a body was read")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 401

    from vllm_multilora.gateway.keys.middleware import AccessMiddleware

    acceptor = AccessMiddleware(app, access, strangers_per_minute=1e9)  # nobody is to wait here
    for key in keys:
        headers = [(b"host", b"test"), (b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        await acceptor(scope, receive, send)
