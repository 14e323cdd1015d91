"""`/openapi.json`, from which clients are generated: what the routes for adapters answer."""

import logging
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient

LOAD, UNLOAD, LIST = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/lora_adapters"

pytestmark = pytest.mark.serving


def document(monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, Any]:
    """What a server with these flags says of itself; no engine is behind it."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.serve.lora import api_router
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_multilora.integration.server.settings.gateway_activation import mount_gateway
    from vllm_multilora.integration.settings.flags import merge_flags

    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(api_router, "router", APIRouter())  # vLLM has one for all servers
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*flags])
    merge_flags(args, args)
    mount_gateway(args)
    level = logging.root.level
    try:
        app = build_app(args, ("generate",))
    finally:
        logging.root.setLevel(level)  # vLLM hides what is not an error, of everybody
    answer = TestClient(app).get("/openapi.json")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def schemas_of(document: dict[str, Any], method: str, path: str) -> dict[str, str]:
    """The names of the bodies' schemas, by status, of all answers that are no success."""
    answers = document["paths"][path][method]["responses"]
    return {
        status: answer["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for status, answer in answers.items()
        if status != "200"
    }


@pytest.mark.smoke
def test_refusals_and_their_problems_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    found = document(monkeypatch, "--enable-lora")
    for path in (LOAD, UNLOAD):
        schemas = schemas_of(found, "post", path)
        assert schemas.pop("422") == "HTTPValidationError"  # FastAPI's own
        assert schemas == dict.fromkeys(
            ("400", "401", "403", "404", "409", "500", "503"), "AdapterErrorResponse"
        ), path
    assert schemas_of(found, "get", LIST) == dict.fromkeys(("401", "404", "503"), "ErrorResponse")
    schemas = found["components"]["schemas"]
    assert schemas["AdapterErrorInfo"]["properties"]["problems"]["items"] == {
        "$ref": "#/components/schemas/Problem"
    }
    texts = {"file", "where", "found", "expected", "message", "hint"}
    assert schemas["Problem"]["properties"].keys() == {*texts, "code", "count"}
    assert "not-allowed" in schemas["Code"]["enum"]


@pytest.mark.parametrize("flags", [(), ("--enable-lora", "--no-multilora")], ids=["LoRA", "plugin"])
def test_what_vllm_says_of_its_routes_stays_where_the_plugin_does_not_act(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    found = document(monkeypatch, *flags)
    for path in (LOAD, UNLOAD):
        assert schemas_of(found, "post", path) == {"422": "HTTPValidationError"}
    assert LIST not in found["paths"]
