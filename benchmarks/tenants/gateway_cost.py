"""What the gateway adds to a call: processor time before and after vLLM's own application.

A chat of about 2 KiB names an adapter. Behind the gateway is an application that reads the body and
answers it at once, as a stream of a hundred events or as one object. Each round sends the same
calls to that application alone, through the gateway of a server without keys (`names`), and through
that of a server with tenants, as one of them (`tenant`), turn by turn. What a call takes more than
without a gateway is its cost; what each event adds is the difference between streams and single
answers, by the number of events.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.harness.turns import paired
from vllm_multilora.tenants.keys import new_key, stored

EVENTS = 100
ADAPTER = "acme-support"


@benchmark(
    workload="chats of 2 KiB that name an adapter, answered at once by one object or 100 events",
    control="the same calls without a gateway, in the same rounds",
    figure="microseconds of one core that the gateway adds to a call, and to an event of a stream",
    compares_to="100 µs a call and 5 µs an event, the goals",
    quick={"calls": 20, "rounds": 2},
)
def gateway_cost(calls: int = 300, rounds: int = 9) -> Iterable[Figure]:
    """What the gateway adds to a call and to an event of a stream.

    Args:
        calls: In each turn, of single answers and of streams.
        rounds: Of turns.
    """
    key = new_key()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"tenants": {"acme": {"keys": [stored(key)], "adapters": ["acme-*"]}}}, file)
        file.flush()
        servers = {"without": _answer, "names": _gateway(None), "tenant": _gateway(file.name)}
        acts = {
            f"{name} {kind}": (lambda s=server, e=events: _seconds(s, key, e, calls))
            for name, server in servers.items()
            for kind, events in (("single", 0), ("stream", EVENTS))
        }
        found = paired(acts, rounds)
    for name in ("names", "tenant"):
        single = [_added_us(row, name, "single") / calls for row in found]
        stream = [_added_us(row, name, "stream") / calls for row in found]
        events = [(s - c) / EVENTS for s, c in zip(stream, single, strict=True)]
        yield Figure(name, "µs more for a call", single)
        yield Figure(name, "µs more for an event", events)


def _added_us(row: dict[str, float], name: str, kind: str) -> float:
    return 1e6 * (row[f"{name} {kind}"] - row[f"without {kind}"])


def _gateway(tenants: str | None) -> Any:
    """The gateway of a server with an adapter, and with the tenants of a file if there is one."""
    from fastapi import FastAPI
    from vllm.lora.request import LoRARequest

    from vllm_multilora.gateway.app import Gateway
    from vllm_multilora.integration.server.names.public_names import separate
    from vllm_multilora.integration.server.requests.metering import METER, ServerMeter

    METER.set(processor := SimpleNamespace(), ServerMeter(None))
    models = SimpleNamespace(
        engine_client=SimpleNamespace(output_processor=processor),
        base_model_paths=[SimpleNamespace(name="base")],
        is_base_model=lambda name: name == "base",
        lora_requests={ADAPTER: LoRARequest(ADAPTER, 1, "/adapters/acme-support")},
    )
    separate(models)
    server = FastAPI()
    server.state.openai_serving_models = models
    settings = {"multilora": {"tenants": tenants}}
    server.state.args = Namespace(enable_lora=True, additional_config=settings, api_key=None)
    gateway = Gateway(_answer)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await gateway({**scope, "app": server}, receive, send)

    return answer


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    """What is behind the gateway: reads a call, and answers with what it names."""
    body = b""
    more = True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    model = json.loads(body)["model"]
    events = int(dict(scope["headers"])[b"x-events"])
    kind = b"text/event-stream; charset=utf-8" if events else b"application/json"
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
    await send(start)
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
    chunk["choices"] = [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]
    text = json.dumps(chunk)
    for _ in range(events):
        content = f"data: {text}\n\n".encode()
        await send({"type": "http.response.body", "body": content, "more_body": True})
    await send({"type": "http.response.body", "body": b"" if events else text.encode()})


def _seconds(server: Any, key: str, events: int, calls: int) -> float:
    """Processor time of calls, one after the other."""
    message = {"role": "user", "content": "How do I change the address of my order? " * 48}
    body = json.dumps({"model": ADAPTER, "messages": [message], "max_tokens": 100}).encode()
    headers = [
        (b"authorization", f"Bearer {key}".encode()),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-events", str(events).encode()),
    ]

    async def call_all() -> float:
        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] != 200:
                raise RuntimeError(f"the call was answered {message['status']}")

        async def call() -> None:
            scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
            await server({**scope, "headers": headers, "query_string": b""}, receive, send)

        await call()
        begun = time.process_time()
        for _ in range(calls):
            await call()
        return time.process_time() - begun

    return asyncio.run(call_all())
