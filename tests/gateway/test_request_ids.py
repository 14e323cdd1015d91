"""Every answer has its request's id, and errors say it in their body, too."""

import json
import re

import pytest

pytest.importorskip("vllm")

from fastapi.testclient import TestClient

from vllm_multilora.gateway.request_ids import for_vllm, identified
from vllm_multilora.tenants.keys import stored

from .test_app import ACME, application, arguments


@pytest.fixture(scope="module", params=[(), ("--enable-request-id-headers",)], ids=["-", "vLLM's"])
def client(request, tmp_path_factory):
    tenants = tmp_path_factory.mktemp("ids") / "tenants.json"
    tenants.write_text(json.dumps({"tenants": {"acme": {"keys": [stored(ACME)]}}}))
    flags = ("--enable-lora", "--multilora-tenants", str(tenants), *request.param)
    return TestClient(application(arguments(*flags)), raise_server_exceptions=False)


def ids(answer, name="x-request-id"):
    return answer.headers.get_list(name)


@pytest.mark.parametrize("path", ["/version", "/v1/completions", "/nowhere", "/a%0Ab"])
def test_answer_has_a_new_id_whoever_gives_it(client, path):
    found = [ids(client.post(path, json={})) for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", *each) for each in found)
    assert found[0] != found[1]


@pytest.mark.parametrize("key", ["", ACME], ids=["stranger", "tenant"])
def test_answer_has_the_clients_own_id(client, key):
    headers = {"x-request-id": "order-7", "x-api-key": key}
    answer = client.post("/v1/chat/completion", json={}, headers=headers)
    assert answer.status_code == (403 if key else 401)
    assert ids(answer) == ["order-7"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/cohere/v2/chat"])
def test_error_says_its_id_beside_what_it_said_before(client, path):
    answer = client.post(path, json={})
    assert answer.status_code == 401
    content = answer.json()
    assert [content.pop("request_id")] == ids(answer)
    assert all(content.values())
    assert answer.headers["content-length"] == str(len(answer.content))


def test_anthropics_clients_find_the_id_under_their_name(client):
    answer = client.post("/v1/messages", json={})
    assert ids(answer, "request-id") == ids(answer)
    assert ids(client.post("/v1/completions", json={}), "request-id") == []


def test_vllm_takes_the_id_of_the_call():
    scope, _ = identified({"path": "/", "headers": [(b"accept", b"*/*")]}, None)
    assert scope["headers"] == [(b"accept", b"*/*")]  # until the body is known
    (_, (name, given)) = for_vllm(scope)["headers"]
    assert (name, len(given)) == (b"x-request-id", 32)
    own = {"path": "/", "headers": [(b"x-request-id", b"mine")]}
    assert for_vllm(identified(own, None)[0])["headers"] == own["headers"]
