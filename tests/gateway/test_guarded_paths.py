"""Every path of vLLM's own app, in all the ways it can be written, and who gets through."""

import asyncio
import contextlib
import json
import logging
import re
from http import HTTPStatus
from itertools import product
from urllib.parse import unquote

import pytest

pytest.importorskip("vllm")

from fastapi import APIRouter
from fastapi.testclient import TestClient
from starlette.routing import Mount

from tests.event_loop import in_event_loop
from vllm_multilora.gateway.keys import middleware
from vllm_multilora.tenants.keys import stored

ADMIN, CLIENT, ACME = "sk-admin-0123456789", "sk-client", "sk-acme"
ROOT = "/api"
MOUNT = "/mounted"
LOCKS = {
    "none": ([], [None]),
    "api": (["api"], [None]),
    "admin": (["admin"], [None]),
    "api-admin": (["api", "admin"], [None, CLIENT]),
    "tenants": (["api", "admin", "tenants"], [None, CLIENT, ACME]),
}
"""The keys of a server, and those that are presented to it: all but the operator's."""

CONTROL = {
    "line-break": lambda path: f"{path}%0a",
    "line-breaks": lambda path: f"{path}%0A%0a",
    "carriage-return": lambda path: f"{path}%0d",
    "null": lambda path: f"{path}%00",
    "tab-before": lambda path: f"%09{path}",
    "line-break-inside": lambda path: path.replace("/", "/%0a", 1),
    "line-break-and-slash": lambda path: f"{path}%0a/",
    "root-path-and-line-break": lambda path: f"{ROOT}{path}%0a",
}
OTHERWISE = {
    "letter": lambda path: f"{path}x",
    "slash": lambda path: f"{path}/",
    "slashes": lambda path: f"{path}//",
    "encoded-slash": lambda path: f"{path}%2f",
    "slash-before": lambda path: f"/{path}",
    "all-slashes-twice": lambda path: path.replace("/", "//"),
    "dots": lambda path: f"/health/..{path}",
    "encoded": lambda path: "/" + "".join(f"%{ord(letter):02x}" for letter in path[1:]),
    "capitals": lambda path: path.upper(),
    "space": lambda path: f"{path}%20",
    "next-line": lambda path: f"{path}%c2%85",
    "line-separator": lambda path: f"{path}%e2%80%a8",
    "parameter": lambda path: f"{path};x",
    "question-mark": lambda path: f"{path}%3fx",
    "root-path": lambda path: f"{ROOT}{path}",
    "other-root-path": lambda path: f"/other{path}",
    "root-path-twice": lambda path: f"{ROOT}{ROOT}{path}",
    "mounted": lambda path: f"{MOUNT}{path}",
}
METHODS = ("GET", "POST", "DELETE", "OPTIONS", "WEBSOCKET")
MANAGE = {
    "/adapters",
    "/adapters/{adapter_name}",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
}
STATUS = {"/v1/lora_adapters", "/v1/lora_adapters/{name:path}"}
OPEN = {"/health", "/ping", "/multilora"}
PAGE = "http://page.test"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST"}


_BRACES = re.compile(r"\{.*?\}")


class Mounting:
    """A middleware of the operator's (`--middleware`): all paths are below another one, too."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if "path" in scope:
            scope = {**scope, "path": scope["path"].removeprefix(MOUNT)}
        await self._app(scope, receive, send)


class Site:
    """vLLM's app without an engine, in which endpoints say that they were reached, and no more."""

    def __init__(self, app):
        self.app = app
        self.paths = {}
        """By the path as it is given to its route, one as a client asks for it."""
        for route in app.router.routes:
            is_mount = isinstance(route, Mount)
            self.paths[route.path] = f"{route.path}/" if is_mount else _BRACES.sub("x", route.path)
            route.app = self._saying(route.path)

    def _saying(self, path):
        async def say(scope, receive, send):
            self.reached = path

        return say

    async def ask(self, method, written, key, **others):
        """The endpoint that is reached; or the answer's status, where it is another's."""
        self.reached, answered = None, []
        key_header = {} if key is None else {"authorization": f"Bearer {key}"}
        headers = {"host": "test", **key_header, **others}
        scope = {
            "path": unquote(written),
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        if method == "WEBSOCKET":
            scope |= {"type": "websocket", "scheme": "ws"}
        else:
            scope |= {"type": "http", "scheme": "http", "http_version": "1.1", "method": method}

        async def send(message):
            answered.append(message.get("status", HTTPStatus.FORBIDDEN))

        async def receive():
            return {"type": "http.request", "body": b"{}"}

        with contextlib.suppress(RuntimeError):  # of a middleware that has seen no answer
            await self.app(scope, receive, send)
        return self.reached or answered[0]


@pytest.fixture(scope="module", params=LOCKS)
def served(request, tmp_path_factory):
    """A server's app, which keys it has, and those that are presented to it."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.serve.lora import api_router
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_multilora.integration.server.settings.gateway_activation import mount_gateway
    from vllm_multilora.integration.settings.flags import merge_flags

    locks, keys = LOCKS[request.param]
    tenants = tmp_path_factory.mktemp("tenants") / "tenants.json"
    acme = {"keys": [stored(ACME)], "adapters": ["acme-*"]}
    tenants.write_text(json.dumps({"tenants": {"acme": acme}}))
    flags = ["--enable-lora", "--root-path", ROOT, "--allowed-origins", json.dumps([PAGE])]
    flags += ["--middleware", f"{__name__}.{Mounting.__name__}"]
    if "api" in locks:
        flags += ["--api-key", CLIENT]
    if "tenants" in locks:
        flags += ["--multilora-tenants", str(tenants)]

    async def no_pause(requests):
        """Requests that have no turn are many here."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        patch.setenv("MULTILORA_ADMIN_KEY", ADMIN if "admin" in locks else "")
        patch.setattr(api_router, "router", APIRouter())  # vLLM has one for all servers
        patch.setattr(middleware, "pause", no_pause)
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
        merge_flags(args, args)
        mount_gateway(args)
        level = logging.root.level
        try:
            app = build_app(args, ("generate",))
            TestClient(app).get("/no/such/path")  # the gateway adds its routes before it answers
            yield Site(app), locks, keys
        finally:
            logging.root.setLevel(level)  # vLLM hides what is not an error, of everybody


@in_event_loop
async def test_however_a_path_is_written_nobody_gets_to_more(served):
    site, _, keys = served
    for key, method in product(keys, METHODS):
        plain = {await site.ask(method, path, key) for path in site.paths.values()}
        for path, (name, write) in product(site.paths.values(), OTHERWISE.items()):
            got = await site.ask(method, write(path), key)
            assert isinstance(got, int) or got in plain, (key, method, path, name)


@in_event_loop
async def test_a_path_with_control_characters_is_nobodys(served):
    site, _, keys = served
    for key, method, plain in product((*keys, ADMIN), METHODS, site.paths.values()):
        for name, write in CONTROL.items():
            got = await site.ask(method, write(plain), key)
            assert got == HTTPStatus.NOT_FOUND, (key, method, plain, name)


def test_who_gets_to_which_endpoint(served):
    """As the table in docs/security.md says."""
    site, locks, keys = served

    async def reached(key):
        asked = product(METHODS, site.paths.values())
        return {await site.ask(method, plain, key) for method, plain in asked} & set(site.paths)

    everything = set(site.paths)
    of_vllm = {path for path in everything if path.startswith(("/v1", "/inference"))}
    for key in keys:
        got = asyncio.run(reached(key))
        if not locks:
            assert got == everything
        elif key == CLIENT:
            assert got == everything - MANAGE
        elif key == ACME:
            assert got >= OPEN | STATUS | {"/v1/models", "/v1/responses", "/invocations"}
            assert not got & (MANAGE | {"/metrics", "/version", "/docs", "/scale_elastic_ep"})
        elif "tenants" in locks:
            assert got == OPEN
        elif "api" in locks:
            assert got == everything - MANAGE - of_vllm - {"/invocations"}
        else:
            assert got == everything - MANAGE - STATUS


@in_event_loop
async def test_a_browsers_preflight_is_answered_before_any_endpoint(served):
    site, _, _ = served
    for plain in site.paths.values():
        assert await site.ask("OPTIONS", plain, None, **PREFLIGHT) == HTTPStatus.OK
        without = await site.ask("OPTIONS", plain, None)
        assert await site.ask("OPTIONS", plain, None, origin=PAGE) == without


@in_event_loop
async def test_the_headers_of_a_preflight_are_no_way_past_the_keys(served):
    site, _, _ = served
    for method, plain in product(set(METHODS) - {"OPTIONS"}, site.paths.values()):
        without = await site.ask(method, plain, None)
        assert await site.ask(method, plain, None, **PREFLIGHT) == without, (method, plain)
