"""Calls to a server with keys, without the server behind them."""

import asyncio
import json

from vllm_multilora.gateway.keys.middleware import AccessMiddleware
from vllm_multilora.integration.server.requests.callers import current_caller
from vllm_multilora.tenants.keys import stored

ADMIN, CLIENT, ACME = "sk-admin-0123456789", "sk-client", "sk-acme"


def write(path, limits, allow=(), **others):
    acme = {"keys": [stored(ACME)], "adapters": ["acme-*"], "limits": limits}
    acme["allow"] = list(allow)
    path.write_text(json.dumps({"tenants": {"acme": acme, **others}}))


class App:
    """Remembers who called it."""

    def __init__(self):
        self.callers = []

    async def __call__(self, scope, receive, send):
        self.callers.append(current_caller.get())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


NO_BODY = {"type": "http.request", "body": b"{}", "more_body": False}


async def call(
    app, access, path, key=None, method="POST", acceptor=None, more=(), bodies=(NO_BODY,)
):
    """The answer's start; through a middleware of its own, unless `acceptor` is one."""
    sent, held = [], [dict(body) for body in bodies]

    async def receive():
        return held.pop(0) if held else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"type": "http", "method": method, "path": path, "headers": [*headers, *more]}
    await (acceptor or AccessMiddleware(app, access))(scope, receive, send)
    return sent[0]


def parts_of(body):
    """As a server gives it, in parts that end anywhere."""
    middle = len(body) // 2
    return [
        {"type": "http.request", "body": body[:middle], "more_body": True},
        {"type": "http.request", "body": body[middle:], "more_body": False},
    ]
