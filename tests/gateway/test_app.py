"""The gateway in vLLM's own application, without an engine behind it."""

import asyncio
import json
import logging
from argparse import Namespace
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")


from fastapi.testclient import TestClient

from vllm_multilora.gateway.fields import FieldError
from vllm_multilora.gateway.first_errors import FirstErrors
from vllm_multilora.integration.server.settings.gateway_activation import GATEWAY, mount_gateway
from vllm_multilora.integration.settings.flags import merge_flags
from vllm_multilora.tenants.keys import stored

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


def test_unknown_fastapi_is_reported_once_and_left_alone(caplog):
    route = SimpleNamespace(path="/v1/a", dependant=SimpleNamespace(body_params=[object()]))
    errors = FirstErrors([object(), route, route])
    errors.check("/v1/a", b"[" + b"{}," * 100 + b"{}]")
    assert caplog.text.count("FastAPI") == 1


def test_long_body_is_validated_up_to_first_error_of_its_lists():
    errors = FirstErrors(application(arguments("--enable-lora")).routes)
    path, message = "/v1/chat/completions", {"role": "user", "content": "hello"}
    right = {"model": "a", "messages": [message] * 100}
    errors.check(path, json.dumps(right).encode())
    wrong = {"model": "a", "messages": [message] * 100 + [{}] * 1000}
    with pytest.raises(FieldError, match=r"validation errors? .*`messages\.100\."):
        errors.check(path, json.dumps(wrong).encode())
    errors.check("/v1/unknown", json.dumps(wrong).encode())  # nothing is known of it


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/completions", "AuthenticationError"), ("/v1/messages", "authentication_error")],
)
@pytest.mark.parametrize("has_tenants", [False, True], ids=["api-key", "tenants"])
def test_stranger_is_refused_in_the_form_of_the_api_whoever_checks_the_key(
    tmp_path, path, kind, has_tenants
):
    flags = ["--enable-lora", "--api-key", "sk-api"]
    if has_tenants:
        tenants = tmp_path / "tenants.json"
        tenants.write_text(json.dumps({"tenants": {"acme": {"keys": [stored(ACME)]}}}))
        flags += ["--multilora-tenants", str(tenants)]
    client = TestClient(application(arguments(*flags)), raise_server_exceptions=False)
    answer = client.post(path, json={"model": "a"})
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == kind
    assert "Authorization: Bearer KEY" in answer.json()["error"]["message"]
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completion", "PermissionDeniedError"),
        ("/v1/messages/batches", "permission_error"),
    ],
)
def test_tenants_refusal_says_that_a_path_is_mistyped(tmp_path, path, kind):
    tenants = tmp_path / "tenants.json"
    tenants.write_text(json.dumps({"tenants": {"acme": {"keys": [stored(ACME)]}}}))
    flags = ("--enable-lora", "--multilora-tenants", str(tenants))
    client = TestClient(application(arguments(*flags)))
    answer = client.post(path, json={}, headers={"x-api-key": ACME})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, kind)
    assert f"POST {path}: it is mistyped" in answer.json()["error"]["message"]
