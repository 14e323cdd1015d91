"""What tenants may ask of a server, over HTTP: the routes and fields of the table, and no more."""

import http.client
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.models.cases import Scenario
from vllm_multilora.gateway.body import DROPPED_BODIES, MAX_BODY_BYTES
from vllm_multilora.gateway.fields import MAX_SHORT_TEXT
from vllm_multilora.gateway.table import TENANT_ROUTES

from .tenant_server import KEYS, TenantServer, tenant_server

pytestmark = [pytest.mark.serving, pytest.mark.slow]

MODEL = {"model": "shared"}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwAD"
    "hgGAWjR9awAAAABJRU5ErkJggg=="
)
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "t5 t6"}]}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


@pytest.fixture(scope="module")
def served(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenantServer]:
    with tenant_server(llama, tmp_path_factory.mktemp("table")) as running:
        yield running


def ask(served: TenantServer, who: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return served.request(who, "POST", path, {**MODEL, **body})


def message_of(answer: httpx.Response) -> str:
    found: str = answer.json()["error"]["message"]
    return found


ALLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": (
        "/v1/completions",
        {"prompt": "t5 t6", "max_tokens": 1, "logprobs": 1, "stop": ["x"], "seed": 1, "user": "u"},
    ),
    "stream": (
        "/v1/completions",
        {"prompt": [5], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "chat": (CHAT, {"messages": MESSAGES, "max_completion_tokens": 1, "metadata": {"task": "x"}}),
    "batch": (f"{CHAT}/batch", {"messages": [MESSAGES, MESSAGES], "max_tokens": 1}),
    "text-format": (
        CHAT,
        {"messages": MESSAGES, "max_tokens": 1, "response_format": {"type": "text"}},
    ),
    "responses": (RESPONSES, {"input": MESSAGES[0]["content"][0]["text"], "max_output_tokens": 1}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1, "system": "t7"}),
    "count": ("/v1/messages/count_tokens", {"messages": MESSAGES}),
    "tokenize": ("/tokenize", {"messages": MESSAGES}),
    "detokenize": ("/detokenize", {"tokens": [5, 6]}),
    "sagemaker": ("/invocations", {"prompt": "t5", "max_tokens": 1}),
}


@pytest.mark.parametrize(("path", "body"), ALLOWED.values(), ids=ALLOWED)
def test_tenant_is_answered_what_the_table_allows(
    served: TenantServer, path: str, body: dict[str, Any]
) -> None:
    answer = ask(served, "texts", path, body)
    assert answer.status_code == 200, f"{answer.text}\n{served.server.log_tail()}"


def test_tenants_adapter_answers_and_not_the_base_model(served: TenantServer) -> None:
    case = served.scenario.cases_of("all-linear-r8")[0]
    body = {
        "prompt": list(case.prompt),
        "max_tokens": len(case.expected.tokens),
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    for path in ("/v1/completions", "/invocations"):
        answer = ask(served, "texts", path, body)
        assert tuple(answer.json()["choices"][0]["token_ids"]) == case.expected.tokens, path


LONG = "a/" * MAX_SHORT_TEXT
REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "unknown": ("/v1/completions", {"prompt": [5], "brand_new": 1}, "brand_new", "`brand_new`"),
    "cache-of-others": (CHAT, {"messages": [], "kv_transfer_params": {}}, "kv_transfer_params", ""),
    "payload": (CHAT, {"messages": [], "mm_payload": "placeholder"}, "mm_payload", ""),
    "beams": ("/v1/completions", {"prompt": [5], "use_beam_search": True}, "use_beam_search", ""),
    "scores": ("/v1/completions", {"prompt": [5], "prompt_logprobs": 1}, "prompt_logprobs", ""),
    "template": (CHAT, {"messages": [], "chat_template": "{{ 1 }}"}, "chat_template", ""),
    "image": (CHAT, {"messages": IMAGE}, "messages", "`image_url`"),
    "grammar": (
        "/v1/completions",
        {"prompt": [5], "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "has not allowed `grammars`",
    ),
    "format": (
        CHAT,
        {"messages": [], "response_format": {"type": "json_object"}},
        "response_format",
        "has not allowed `grammars`",
    ),
    "tools": (CHAT, {"messages": [], "tools": [TOOL]}, "tools", "has not allowed `grammars`"),
    "sagemaker-tools": ("/invocations", {"messages": [], "tools": [TOOL]}, "tools", "`grammars`"),
    "store": (RESPONSES, {"input": "t5", "store": True}, "store", "not allowed for tenants"),
    "background": (
        RESPONSES,
        {"input": "t5", "background": True},
        "background",
        "not allowed for tenants",
    ),
    "previous": (
        RESPONSES,
        {"input": "t5", "previous_response_id": "resp_1"},
        "previous_response_id",
        "not allowed for tenants",
    ),
    "long": ("/v1/completions", {"prompt": [5], "user": LONG}, "user", "found a text of 2048"),
    "deep": (CHAT, {"messages": [], "metadata": json.loads("[" * 70 + "]" * 70)}, "metadata", "64"),
}


@pytest.mark.parametrize(("path", "body", "param", "part"), REFUSED.values(), ids=REFUSED)
def test_tenant_learns_which_field_it_may_not_send(
    served: TenantServer, path: str, body: dict[str, Any], param: str, part: str
) -> None:
    answer = ask(served, "texts", path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, param)
    assert param in error["message"]
    assert part in error["message"]


def test_refusal_has_the_form_of_the_api_that_was_called(served: TenantServer) -> None:
    answer = ask(served, "texts", "/v1/messages", {"messages": MESSAGES, "seed": 1})
    assert answer.status_code == 400
    assert answer.json() == {
        "type": "error",
        "error": {
            "type": "BadRequestError",
            "message": "Fields that are not allowed here: `seed`.",
        },
    }


@pytest.mark.parametrize(
    ("method", "path", "word"),
    [
        ("POST", "/v1/audio/transcriptions", "media"),
        ("POST", "/v1/audio/translations", "media"),
    ],
)
def test_path_that_needs_a_word_says_which(
    served: TenantServer, method: str, path: str, word: str
) -> None:
    answer = served.request("texts", method, path)
    assert answer.status_code == 403, answer.text
    assert message_of(answer) == (
        f"This path is not allowed for this tenant: the server's operator has not allowed `{word}`."
    )
    assert served.request("trusted", method, path).status_code in (400, 404, 405)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/brand/new"),
        ("POST", "/inference/v1/generate"),
        ("POST", "/generative_scoring"),
        ("POST", "/v1/systemone"),
        ("POST", "/v1/completions/render"),
        ("POST", "/v1/completions/derender"),
        ("GET", "/v1/completions"),
        ("GET", f"{RESPONSES}/resp_1"),
        ("POST", f"{RESPONSES}/resp_1/cancel"),
        ("GET", "/metrics"),
    ],
)
def test_path_that_the_table_does_not_know_is_forbidden(
    served: TenantServer, method: str, path: str
) -> None:
    for who in ("texts", "trusted"):
        answer = served.request(who, method, path, {} if method == "POST" else None)
        assert answer.status_code == 403, answer.text
        assert message_of(answer).startswith("The key does not allow this")


def test_trusted_tenant_sends_grammars_and_tools(served: TenantServer) -> None:
    grammar = {"prompt": [5], "max_tokens": 1, "structured_outputs": {"choice": ["t5"]}}
    assert ask(served, "trusted", "/v1/completions", grammar).status_code == 200
    tools = {"messages": MESSAGES, "max_tokens": 1, "tools": [TOOL], "tool_choice": "none"}
    answer = ask(served, "trusted", CHAT, tools)
    assert answer.status_code == 200, answer.text


def test_response_of_a_tenant_is_not_stored(served: TenantServer) -> None:
    made = ask(served, "texts", RESPONSES, {"input": "t5", "max_output_tokens": 1}).json()
    assert served.request("admin", "GET", f"{RESPONSES}/{made['id']}").status_code == 404


def test_trusted_tenants_image_reaches_vllm_and_its_address_does_not(served: TenantServer) -> None:
    answer = ask(served, "trusted", CHAT, {"messages": IMAGE})
    assert "not a multimodal model" in answer.text, answer.text  # vLLM's own words
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
    answer = ask(served, "trusted", CHAT, {"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == 400
    assert "expected a `data:` URL" in message_of(answer)


def test_others_may_send_whatever_vllm_takes(served: TenantServer) -> None:
    body = {"prompt": [5], "max_tokens": 1, "prompt_logprobs": 1, "vllm_xargs": {"a": 1}}
    for who in ("client", "admin"):
        assert ask(served, who, "/v1/completions", body).status_code == 200


@pytest.mark.parametrize("times", [1, DROPPED_BODIES - 1], ids="{} times".format)
def test_client_sees_that_its_body_was_too_large(served: TenantServer, times: int) -> None:
    """Refused at once, its connection would be reset while it sends."""
    connection = http.client.HTTPConnection("127.0.0.1", served.server.port, timeout=60)
    headers = {"Authorization": f"Bearer {KEYS['texts']}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", bytes(times * MAX_BODY_BYTES + 1), headers)
    answer = connection.getresponse()
    assert answer.status == 413
    assert f"expected {MAX_BODY_BYTES} at most" in answer.read().decode()
    connection.close()


def test_every_route_of_the_table_was_asked_here_or_by_another_test() -> None:
    asked = {path for path, _ in ALLOWED.values()}
    pooling = {"/v1/embeddings", "/v2/embed", "/pooling", "/score", "/v1/score", "/classify"}
    pooling |= {"/rerank", "/v1/rerank", "/v2/rerank"}
    speech = {"/v1/audio/transcriptions", "/v1/audio/translations"}
    assert TENANT_ROUTES.keys() == asked | pooling | speech | {"/cohere/v2/chat"}
