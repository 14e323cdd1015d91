"""The gateway in vLLM's own application, without an engine behind it."""

import asyncio
import json
import logging
from argparse import Namespace

import pytest

pytest.importorskip("vllm")

from fastapi.testclient import TestClient
from starlette.requests import Request

from vllm_multilora.gateway.app import Gateway
from vllm_multilora.gateway.invocations import InvocationsMiddleware
from vllm_multilora.integration.server.settings.mounting import GATEWAY, mount_gateway
from vllm_multilora.integration.settings.flags import merge_flags
from vllm_multilora.tenants.keys import stored

SAGEMAKER_HEADER = "x-amzn-sagemaker-adapter-identifier"
ACME = "sk-acme"


def arguments(*flags: str) -> Namespace:
    """A server's arguments, as vLLM reads them."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*flags])
    merge_flags(args, args)
    mount_gateway(args)
    return args


def application(args: Namespace):
    from vllm.entrypoints.launchers.app import build_app

    level = logging.root.level
    try:
        return build_app(args, ("generate",))
    finally:
        logging.root.setLevel(level)  # vLLM hides what is not an error, of everybody


@pytest.mark.parametrize("flags", [(), ("--enable-lora", "--no-multilora")], ids=["LoRA", "plugin"])
def test_server_whose_plugin_is_off_has_no_gateway(flags):
    assert arguments(*flags).middleware == []


def test_gateway_is_in_front_of_vllm_and_behind_operators_middlewares():
    gzip = "starlette.middleware.gzip.GZipMiddleware"
    args = arguments(
        *("--enable-lora", "--api-key", "sk-api", "--enable-request-id-headers"),
        *("--middleware", gzip, "--middleware", gzip),
    )
    assert args.middleware == [GATEWAY, gzip, gzip]
    mount_gateway(args)  # each of several API servers does so once more
    assert args.middleware == [GATEWAY, gzip, gzip]
    names = [each.cls.__name__ for each in application(args).user_middleware]
    assert names[:3] == ["GZipMiddleware", "GZipMiddleware", "Gateway"]
    assert {"XRequestIdMiddleware", "AuthenticationMiddleware"} <= set(names[3:])


def test_server_whose_keys_cannot_be_read_does_not_start(tmp_path):
    tenants = tmp_path / "tenants.json"
    tenants.write_text(json.dumps({"tenants": {"acme": {"keys": [stored(ACME)]}}}))
    app = application(arguments("--enable-lora", "--multilora-tenants", str(tenants)))
    tenants.write_text('{"tenants": 7}')

    async def start():
        sent = []

        async def receive():
            return {"type": "lifespan.startup"}

        async def send(message):
            sent.append(message)

        await app({"type": "lifespan"}, receive, send)
        return sent

    [message] = asyncio.run(start())
    assert message["type"] == "lifespan.startup.failed"
    assert "expected tenants by name" in message["message"]


def test_known_callers_pass_vllms_own_check_and_strangers_do_not(tmp_path):
    tenants = tmp_path / "tenants.json"
    tenants.write_text(json.dumps({"tenants": {"acme": {"keys": [stored(ACME)]}}}))
    flags = ("--enable-lora", "--multilora-tenants", str(tenants), "--api-key", "sk-api")
    client = TestClient(application(arguments(*flags)), raise_server_exceptions=False)
    for key, status in ((None, 401), ("sk-wrong", 401), (ACME, 500), ("sk-api", 500)):
        headers = {"x-api-key": key} if key else {}
        body = {"model": "a", "prompt": "b"}
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == status, (key, answer.text)  # 500: there is no engine


async def through(middleware, body, header=None):
    """What is behind a middleware gets of a request to `/invocations`, and the answer's status."""
    found, sent = {}, []

    async def app(scope, receive, send):
        request = Request(scope, receive)
        found["header"] = request.headers.getlist(SAGEMAKER_HEADER)
        found["body"] = await request.body()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    parts = [body[:5], body[5:]]

    async def receive():
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    headers = [(SAGEMAKER_HEADER.encode(), each.encode("latin-1")) for each in header or ()]
    scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": headers}
    await middleware(app)(scope, receive, send)
    return found, sent[0]["status"]


@pytest.mark.parametrize(
    ("header", "model"),
    [
        ([], "zen-a"),
        ([""], "zen-a"),
        ([" \t"], "zen-a"),
        (["acme-a"], "acme-a"),
        (["", "acme-a"], "acme-a"),
        (["acme-a", "zen-b"], "acme-a"),
    ],
    ids=["none", "empty", "spaces", "another", "second", "two"],
)
def test_sagemakers_header_names_the_model_of_the_body_unless_it_names_one(header, model):
    body = b'{"model": "zen-a", "prompt": [7]}'
    found, status = asyncio.run(through(InvocationsMiddleware, body, header))
    assert found == {"header": [model], "body": body}
    assert status == 200


@pytest.mark.parametrize(
    "body", [b'{"prompt": [7]}', b'{"model": null}', b"[]", b"{", b"[" * 9_999]
)
def test_invocation_that_names_no_model_gets_no_header(body):
    found, status = asyncio.run(through(InvocationsMiddleware, body, [""]))
    assert found == {"header": [], "body": body}
    assert status == 200


@pytest.mark.parametrize("model", [7, ["zen-a"], "客户"], ids=["number", "list", "not-latin-1"])
def test_invocation_whose_model_no_header_can_carry_is_refused(model):
    found, status = asyncio.run(
        through(InvocationsMiddleware, json.dumps({"model": model}).encode())
    )
    assert not found
    assert status == 400


@pytest.mark.smoke
@pytest.mark.parametrize("header", [None, "", "acme-a"], ids=["none", "empty", "another"])
def test_sagemakers_own_code_puts_the_headers_model_into_the_body(header):
    module = pytest.importorskip(
        "model_hosting_container_standards.sagemaker.lora.transforms.inject_to_body"
    )
    transforming = module.InjectToBodyApiTransform({"model": f'headers."{SAGEMAKER_HEADER}"'})
    seen = []

    class Transform:
        def __init__(self, app):
            self._app = app

        async def __call__(self, scope, receive, send):
            request = Request({**scope, "query_string": b""}, receive)
            await transforming.transform_request(request)
            seen.append(json.loads(await request.body()))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    body = b'{"model": "zen-a", "prompt": [7]}'

    def both(app):
        return InvocationsMiddleware(Transform(app))

    asyncio.run(through(both, body, None if header is None else [header]))
    assert seen == [{"model": header or "zen-a", "prompt": [7]}]


def test_path_with_control_characters_is_answered_before_any_key_is_looked_at():
    async def ask():
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/health\n", "headers": []}
        await Gateway(None)(scope, None, send)
        return sent[0]["status"]

    assert asyncio.run(ask()) == 404
