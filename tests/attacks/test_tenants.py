"""Who may see and do what on a server with keys and tenants, over HTTP."""

import contextlib
import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.engine import store_folder
from tests.serving.faults.faulty_reader import FAULT, FAULTY_READER
from tests.serving.models.cases import Scenario
from vllm_multilora.gateway.body import DROPPED_BODIES, MAX_BODY_BYTES
from vllm_multilora.gateway.limits.tenant_turns import LONGEST_PAUSE_S, STRANGERS_PER_MINUTE
from vllm_multilora.gateway.table import TENANT_ROUTES
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE
from vllm_multilora.store.store_launch import StoreProcess

from .flood import CONNECTIONS, Flood
from .tenant_server import (
    ADAPTERS,
    BASE,
    KEYS,
    TENANTS,
    TenantServer,
    tenant_server,
    write_tenants,
)

pytestmark = [pytest.mark.serving, pytest.mark.slow]

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def served(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenantServer]:
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv(FOLDER_VARIABLE, stack.enter_context(store_folder()))
        # The server finds this store, and does not start one of its own.
        store = StoreClient(StoreProcess(FAULTY_READER), "tests", role="observer")
        stack.callback(store.close)
        yield stack.enter_context(tenant_server(llama, tmp_path_factory.mktemp("tenants")))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


SAGEMAKER_HEADER = "x-amzn-sagemaker-adapter-identifier"
STREAM = {"max_tokens": 1, "stream": True}
MESSAGES = [{"role": "user", "content": "t5 t6 t7"}]
ENDPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": "t5 t6", "max_tokens": 1}),
    "stream": ("/v1/completions", {"prompt": "t5 t6", **STREAM}),
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}),
    "chat-stream": (
        "/v1/chat/completions",
        {"messages": MESSAGES, **STREAM},
    ),
    "responses": ("/v1/responses", {"input": "t5 t6", "max_output_tokens": 1}),
    "messages": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1}),
    "count-tokens": ("/v1/messages/count_tokens", {"messages": MESSAGES}),
    "tokenize": ("/tokenize", {"prompt": "t5 t6"}),
    "detokenize": ("/detokenize", {"tokens": [5, 6]}),
    "sagemaker": ("/invocations", {"prompt": "t5 t6", "max_tokens": 1}),
}


def ask(served: TenantServer, who: str, endpoint: str, model: str | None) -> httpx.Response:
    path, body = ENDPOINTS[endpoint]
    if path == "/invocations":  # has its model in a header alone
        return served.request(who, "POST", path, body, **{SAGEMAKER_HEADER: model or ""})
    named = {"model": model} if model is not None else {}
    return served.request(who, "POST", path, {**named, **body})


def assert_status(response: httpx.Response, expected: int, served: TenantServer) -> None:
    assert response.status_code == expected, f"{response.text}\n{served.server.log_tail()}"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_endpoint_asks_who_is_asking(served: TenantServer, endpoint: str) -> None:
    assert_status(ask(served, "acme", endpoint, "acme-a"), 200, served)
    for who in ("nobody", "wrong"):
        answer = ask(served, who, endpoint, "acme-a")
        assert_status(answer, 401, served)
        assert answer.headers["www-authenticate"] == "Bearer"
        if endpoint in ("messages", "count-tokens"):
            assert answer.json()["type"] == "error"
        else:
            assert answer.json()["error"]["code"] == 401


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_one_may_not_see_is_what_does_not_exist(served: TenantServer, endpoint: str) -> None:
    """Others' adapters, adapters that nobody has, and those of one's own that are not there."""
    names = ("zen-a", "zen-none", "zen-route", "acme-none", BASE)
    answers = {name: ask(served, "acme", endpoint, name) for name in names}
    for answer in answers.values():
        assert_status(answer, 404, served)
    texts = {
        answer.text.replace(f"`{name}`", "NAME").replace(answer.headers["x-request-id"], "ID")
        for name, answer in answers.items()
    }
    assert len(texts) == 1, texts
    assert "alias" not in texts.pop()
    for_all = ask(served, "client", endpoint, "zen-none")  # a key for all names
    assert_status(for_all, 404, served)
    assert f"Valid aliases: {BASE}" in for_all.text
    assert len({frozenset(answer.headers) for answer in (*answers.values(), for_all)}) == 1


def test_a_body_in_many_short_parts_is_no_endless_head(served: TenantServer) -> None:
    """More than a head may have is beside the parts."""
    body = b'{"model": "acme-a", "prompt": [5], "max_tokens": 1%s}' % (b" " * 50_000)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {KEYS['acme']}\r\n"
        f"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    extension = b"a" * 100
    address = ("127.0.0.1", served.server.port)
    with socket.create_connection(address, timeout=LIMIT_S) as connection:
        connection.sendall(head.encode())
        parts = b"".join(b"1;%s\r\n%c\r\n" % (extension, each) for each in body)
        connection.sendall(parts + b"0\r\n\r\n")
        assert b"HTTP/1.1 200" in connection.recv(1 << 16)


LISTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{}] * 400}),
    "responses": ("/v1/responses", {"input": [{}] * 400}),
    "responses-content": ("/v1/responses", {"input": [{"role": "user", "content": [0] * 400}]}),
    "messages": ("/v1/messages", {"messages": [{}] * 400, "max_tokens": 1}),
    "choice": (
        "/v1/chat/completions",
        {"messages": [], "structured_outputs": {"choice": [0] * 400}},
    ),
    "fields": (
        "/v1/chat/completions",
        {"messages": [], "logit_bias": {str(number): {} for number in range(400)}},
    ),
}


@pytest.mark.parametrize(("path", "body"), LISTS.values(), ids=LISTS)
def test_many_wrong_items_are_read_to_the_first(
    served: TenantServer, path: str, body: dict[str, Any]
) -> None:
    """vLLM would say of each what is wrong with it as a message, as a call of a tool, and so on."""
    answer = served.request("acme", "POST", path, {"model": "acme-a", **body})
    assert_status(answer, 400, served)
    found = re.search(r"(\d+) validation errors?", answer.text)
    assert found is not None, answer.text
    assert int(found[1]) < 400


def test_no_answer_repeats_what_it_was_asked_without_end(served: TenantServer) -> None:
    """Fifty megabytes here; 64 MiB of a body, for 2,048 answers, would end the server."""
    body = {
        "model": "acme-a",
        # The template takes one character of it.
        "messages": [{"role": "assistant", "content": "5" + " " * 100_000}],
        "add_generation_prompt": False,
        "echo": True,
        "max_tokens": 1,
    }
    answer = served.request("acme", "POST", "/v1/chat/completions", body | {"n": 500})
    assert answer.status_code == 400, f"{answer.status_code}: {len(answer.content)} bytes"
    assert "would be repeated" in answer.text
    answer = served.request("acme", "POST", "/v1/chat/completions", body | {"n": 2})
    assert_status(answer, 200, served)
    assert len(answer.content) > 200_000


RIGHTS = [
    ("acme", "acme-a", 200),
    ("acme", "acme-b", 200),
    ("acme", "shared", 200),
    ("acme", "acme-route", 200),
    ("acme", "zen-a", 404),
    ("acme", "zen-route", 404),
    ("acme", "base-route", 404),
    ("acme", BASE, 404),
    ("acme", None, 404),
    ("acme", "acme-broken", 400),
    ("zen", "zen-a", 200),
    ("zen", "shared", 200),
    ("zen", "acme-a", 404),
    ("zen", "acme-broken", 404),
    ("zen", "acme-route", 404),
    ("zen", "zen-route", 404),
    ("zen", "zen-a ", 404),
    ("zen", "ZEN-A", 404),
    ("zen", BASE, 404),
    ("plain", BASE, 200),
    ("plain", None, 200),
    ("plain", "shared", 404),
    ("plain", "base-route", 404),
    ("client", "zen-a", 200),
    ("client", "acme-route", 200),
    ("client", BASE, 200),
    ("admin", "zen-a", 200),
    ("admin", "base-route", 200),
    ("admin", BASE, 200),
    ("nobody", BASE, 401),
    ("wrong", "shared", 401),
]


@pytest.mark.parametrize(("who", "model", "status"), RIGHTS)
def test_a_model_answers_those_who_may_use_it(
    served: TenantServer, who: str, model: str | None, status: int
) -> None:
    assert_status(ask(served, who, "completions", model), status, served)


CALLS = [
    ("nobody", "GET", "/health", 200),
    ("nobody", "GET", "/multilora", 200),
    ("nobody", "POST", "/multilora", 401),
    ("nobody", "GET", "/ping", 200),
    ("nobody", "GET", "/metrics", 401),
    ("nobody", "GET", "/version", 401),
    ("nobody", "GET", "/v1/models", 401),
    ("nobody", "GET", "/v1/lora_adapters", 401),
    ("nobody", "POST", "/v1/load_lora_adapter", 401),
    ("nobody", "POST", "/v1/unload_lora_adapter", 401),
    ("nobody", "POST", "/adapters", 401),
    ("nobody", "DELETE", "/adapters/zen-a", 401),
    ("nobody", "POST", "/invocations", 401),
    ("acme", "GET", "/metrics", 403),
    ("acme", "GET", "/openapi.json", 403),
    ("acme", "POST", "/v1/load_lora_adapter", 403),
    ("acme", "POST", "/v1/unload_lora_adapter", 403),
    ("acme", "POST", "/adapters", 403),
    ("acme", "POST", "/adapters/", 403),
    ("acme", "DELETE", "/adapters/zen-a", 403),
    ("acme", "DELETE", "/adapters/acme-a", 403),
    ("acme", "POST", "/inference/v1/abort_requests", 403),
    ("acme", "POST", "/inference/v1/generate", 403),
    ("acme", "POST", "/v1/completions/render", 403),
    ("acme", "GET", "/v1/completions", 403),
    ("acme", "POST", "/v1/completions/derender", 403),
    ("acme", "GET", "/v1/responses/resp_1", 403),
    ("acme", "POST", "/v1/responses/resp_1/cancel", 403),
    ("acme", "POST", "/generative_scoring", 403),
    ("acme", "POST", "/v1/systemone", 403),
    ("acme", "POST", "/no/such/path", 403),
    ("trusted", "POST", "/no/such/path", 403),
    ("client", "GET", "/metrics", 200),
    ("client", "POST", "/v1/load_lora_adapter", 403),
    ("client", "POST", "/v1/unload_lora_adapter", 403),
    ("client", "POST", "/adapters", 403),
    ("client", "DELETE", "/adapters/zen-a", 403),
    ("admin", "GET", "/metrics", 200),
    ("admin", "POST", "/no/such/path", 404),
    ("admin", "DELETE", "/adapters/none", 404),
]


@pytest.mark.parametrize(("who", "method", "path", "status"), CALLS)
def test_a_path_answers_those_who_may_call_it(
    served: TenantServer, who: str, method: str, path: str, status: int
) -> None:
    body = {"name": "new", "src": "new", "lora_name": "new", "lora_path": "new"}
    sent = body if method == "POST" else None
    assert_status(served.request(who, method, path, sent), status, served)


def test_nothing_was_loaded_or_unloaded_by_those_who_may_not(served: TenantServer) -> None:
    rows = served.request("admin", "GET", "/v1/lora_adapters").json()["data"]
    assert {row["id"] for row in rows} == {*ADAPTERS, "acme-broken"}


def test_operators_load_and_unload_by_both_interfaces(served: TenantServer) -> None:
    path = str(served.scenario.adapters["qv-r5"])
    for load, unload in (
        (
            ("POST", "/v1/load_lora_adapter", {"lora_name": "extra", "lora_path": path}),
            ("POST", "/v1/unload_lora_adapter", {"lora_name": "extra"}),
        ),
        (("POST", "/adapters", {"name": "extra", "src": path}), ("DELETE", "/adapters/extra")),
    ):
        assert_status(served.request("admin", *load), 200, served)
        assert_status(ask(served, "admin", "completions", "extra"), 200, served)
        assert_status(served.request("admin", *unload), 200, served)


@pytest.mark.parametrize(
    ("who", "seen"),
    [
        ("acme", {"acme-a", "acme-b", "acme-broken", "shared", "acme-route"}),
        ("zen", {"zen-a", "shared"}),
        ("plain", {BASE}),
        ("client", {BASE, *ADAPTERS, "acme-broken", "acme-route", "zen-route", "base-route"}),
    ],
)
def test_a_list_of_models_has_what_one_may_use(
    served: TenantServer, who: str, seen: set[str]
) -> None:
    answer = served.request(who, "GET", "/v1/models")
    assert {card["id"] for card in answer.json()["data"]} == seen
    for root in (*served.roots, served.scenario.base):
        assert str(root) not in answer.text


def test_operators_see_folders(served: TenantServer) -> None:
    models = served.request("admin", "GET", "/v1/models").text
    status = served.request("admin", "GET", "/v1/lora_adapters").text
    for root in served.roots:
        assert str(root) in models
        assert str(root) in status


@pytest.mark.parametrize("who", ["acme", "zen", "client"])
def test_status_shows_no_folders_and_tenants_their_own_alone(
    served: TenantServer, who: str
) -> None:
    answer = served.request(who, "GET", "/v1/lora_adapters")
    assert_status(answer, 200, served)
    assert not any(str(root) in answer.text for root in served.roots)
    rows = {row["id"]: row for row in answer.json()["data"]}
    if who == "client":
        assert set(rows) == {*ADAPTERS, "acme-broken"}
        return
    own = {"acme-a", "acme-b", "acme-broken", "shared"} if who == "acme" else {"zen-a", "shared"}
    assert set(rows) == own
    assert set(answer.json()) == {"object", "data"}
    assert set(rows["shared"]) == {"id", "object", "kind", "state", "rank", "last_error"}


def test_errors_name_no_folders(served: TenantServer) -> None:
    """Errors about an adapter that cannot be loaded give no paths away."""
    for who in ("acme", "client"):
        answer = ask(served, who, "completions", "acme-broken")
        assert_status(answer, 400, served)
        assert not any(str(root) in answer.text for root in served.roots)
        assert answer.json()["error"]["problems"]


def cached(served: TenantServer, who: str, prompt: Any, **options: Any) -> int:
    answer = served.complete(who, "shared", prompt, **options)
    assert_status(answer, 200, served)
    return (answer.json()["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)


def test_cached_prefixes_are_a_tenants_own(served: TenantServer) -> None:
    """Asked for the same prompt with the same adapter, twice each."""
    prompt = [(5 * i + 3) % 300 for i in range(40)]
    for options in ({}, {"cache_salt": "mine"}, {"cache_salt": "other"}):
        for who in ("acme", "zen", "client"):
            assert cached(served, who, prompt, **options) == 0, (who, options)
            assert cached(served, who, prompt, **options) == 32, (who, options)


def test_calls_beyond_a_tenants_limits_wait_and_then_are_refused(served: TenantServer) -> None:
    with served.half_sent("narrow", "shared") as running:
        with served.half_sent("narrow", "shared"):  # waits
            refused = served.complete("narrow", "shared", [5])
            assert_status(refused, 429, served)
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "RateLimitError"
            assert_status(served.complete("acme", "shared", [5]), 200, served)

        def waits() -> bool:
            """Whether the place of the one that has gone is free again."""
            try:
                with served.half_sent("narrow", "shared"):
                    return True
            except AssertionError:
                return False

        until(waits)
        answers: list[int] = []
        waiting = threading.Thread(
            target=lambda: answers.append(served.complete("narrow", "shared", [5]).status_code)
        )
        waiting.start()
        assert b" 200 " in running.finish()
        waiting.join(LIMIT_S)
        # It may have come before the server had noticed that the one before it had gone.
        assert answers in ([200], [429])
    until(lambda: served.complete("narrow", "shared", [5]).status_code == 200)


def test_a_tenant_that_has_used_its_tokens_learns_when_to_come_again(served: TenantServer) -> None:
    answer = served.complete("thrifty", "shared", [9] * 100, max_tokens=12, ignore_eos=True)
    assert_status(answer, 200, served)
    refused = served.complete("thrifty", "shared", [9])
    assert_status(refused, 429, served)
    assert 1 < int(refused.headers["retry-after"]) <= 53
    assert "tokens" in refused.json()["error"]["message"]
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    limit = int(refused.headers["x-ratelimit-limit-tokens"])
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) <= limit
    assert metric(served, "tenant_tokens_per_minute_limit", tenant="thrifty") == limit
    assert 112 <= metric(served, "tenant_tokens_total", tenant="thrifty") < 200


def test_a_tenant_uses_as_many_adapters_at_a_time_as_it_may(served: TenantServer) -> None:
    """A stream holds its adapter until it ends, which here it does soon: tried until one is met."""
    body = {"model": "acme-a", "prompt": [5], "max_tokens": 120, "stream": True, "ignore_eos": True}
    key = {"authorization": f"Bearer {KEYS['picky']}"}

    def is_refused() -> bool:
        with (
            httpx.Client(base_url=served.server.url, trust_env=False, timeout=120) as client,
            client.stream("POST", "/v1/completions", json=body, headers=key) as stream,
        ):
            assert stream.status_code == 200
            other = served.complete("picky", "zen-a", [5])
            assert_status(served.complete("picky", "acme-a", [5]), 200, served)
        if other.status_code == 200:  # the stream had ended
            return False
        assert_status(other, 429, served)
        assert other.headers["retry-after"] == "1"
        return True

    until(is_refused)
    until(lambda: served.complete("picky", "zen-a", [5]).status_code == 200)


# What tenants may send: the routes and fields of the table, and no more.

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwAD"
    "hgGAWjR9awAAAABJRU5ErkJggg=="
)
PARTS = [{"role": "user", "content": [{"type": "text", "text": "t5 t6"}]}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def image(url: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def send(served: TenantServer, who: str, path: str, **body: Any) -> httpx.Response:
    return served.request(who, "POST", path, {"model": "shared", **body})


def message_of(answer: httpx.Response) -> str:
    found: str = answer.json()["error"]["message"]
    return found


ALLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": (
        COMPLETIONS,
        {"prompt": "t5 t6", "max_tokens": 1, "logprobs": 1, "stop": ["x"], "seed": 1, "user": "u"},
    ),
    "usage": (
        COMPLETIONS,
        {"prompt": [5], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "chat": (CHAT, {"messages": PARTS, "max_completion_tokens": 1, "metadata": {"task": "x"}}),
    "batch": (f"{CHAT}/batch", {"messages": [PARTS, PARTS], "max_tokens": 1}),
    "format": (
        CHAT,
        {"messages": PARTS, "max_tokens": 1, "response_format": {"type": "text"}},
    ),
    "system": ("/v1/messages", {"messages": PARTS, "max_tokens": 1, "system": "t7"}),
}


@pytest.mark.parametrize(("path", "body"), ALLOWED.values(), ids=ALLOWED)
def test_tenant_is_answered_what_the_table_allows(
    served: TenantServer, path: str, body: dict[str, Any]
) -> None:
    assert_status(send(served, "texts", path, **body), 200, served)


def test_every_route_of_the_table_is_asked_here_or_by_another_test() -> None:
    asked = {path for path, _ in (*ENDPOINTS.values(), *ALLOWED.values())}
    pooling = {"/v1/embeddings", "/v2/embed", "/pooling", "/score", "/v1/score", "/classify"}
    pooling |= {"/rerank", "/v1/rerank", "/v2/rerank"}
    speech = {"/v1/audio/transcriptions", "/v1/audio/translations"}
    assert TENANT_ROUTES.keys() == asked | pooling | speech | {"/cohere/v2/chat"}


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "unknown": (COMPLETIONS, {"prompt": [5], "brand_new": 1}, "brand_new", "`brand_new`"),
    "image": (CHAT, {"messages": image(PIXEL)}, "messages", "`image_url`"),
    "tools": (CHAT, {"messages": [], "tools": [TOOL]}, "tools", "has not allowed `grammars`"),
    "sagemaker-tools": ("/invocations", {"messages": [], "tools": [TOOL]}, "tools", "`grammars`"),
    "store": (RESPONSES, {"input": "t5", "store": True}, "store", "not allowed for tenants"),
    "deep": (CHAT, {"messages": [], "metadata": json.loads("[" * 70 + "]" * 70)}, "metadata", "64"),
}


@pytest.mark.parametrize(("path", "body", "param", "part"), REFUSED.values(), ids=REFUSED)
def test_tenant_learns_which_field_it_may_not_send(
    served: TenantServer, path: str, body: dict[str, Any], param: str, part: str
) -> None:
    answer = send(served, "texts", path, **body)
    assert_status(answer, 400, served)
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, param)
    assert part in error["message"]


def test_refusal_has_the_form_of_the_api_that_was_called(served: TenantServer) -> None:
    answer = send(served, "texts", "/v1/messages", messages=PARTS, seed=1)
    assert_status(answer, 400, served)
    message = "Fields that are not allowed here: `seed`."
    expected = {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    assert answer.json() == {**expected, "request_id": answer.headers["request-id"]}


def test_path_that_needs_a_word_says_which(served: TenantServer) -> None:
    path = "/v1/audio/transcriptions"
    answer = served.request("texts", "POST", path)
    assert_status(answer, 403, served)
    assert message_of(answer) == (
        "This path is not allowed for this tenant: the server's operator has not allowed `media`."
    )
    assert served.request("trusted", "POST", path).status_code in (400, 404, 405)


def test_trusted_tenant_sends_grammars_tools_and_images_but_no_addresses(
    served: TenantServer,
) -> None:
    choice = {"structured_outputs": {"choice": ["t5"]}}
    assert_status(
        send(served, "trusted", COMPLETIONS, prompt=[5], max_tokens=1, **choice), 200, served
    )
    tools = {"tools": [TOOL], "tool_choice": "none"}
    assert_status(send(served, "trusted", CHAT, messages=PARTS, max_tokens=1, **tools), 200, served)
    answer = send(served, "trusted", CHAT, messages=image(PIXEL))
    assert "not a multimodal model" in answer.text, answer.text  # vLLM's own words
    answer = send(served, "trusted", CHAT, messages=image("http://127.0.0.1:1/a.png"))
    assert_status(answer, 400, served)
    assert "expected a `data:` URL" in message_of(answer)


def test_response_of_a_tenant_is_not_stored(served: TenantServer) -> None:
    made = send(served, "texts", RESPONSES, input="t5", max_output_tokens=1).json()
    assert_status(served.request("admin", "GET", f"{RESPONSES}/{made['id']}"), 404, served)


def test_others_may_send_whatever_vllm_takes(served: TenantServer) -> None:
    body = {"prompt": [5], "max_tokens": 1, "prompt_logprobs": 1, "vllm_xargs": {"a": 1}}
    for who in ("client", "admin"):
        assert_status(send(served, who, COMPLETIONS, **body), 200, served)


@pytest.mark.parametrize("times", [1, DROPPED_BODIES - 1], ids="{} times".format)
def test_client_sees_that_its_body_was_too_large(served: TenantServer, times: int) -> None:
    """Refused at once, its connection would be reset while it sends."""
    connection = http.client.HTTPConnection("127.0.0.1", served.server.port, timeout=60)
    headers = {"Authorization": f"Bearer {KEYS['texts']}", "Content-Type": "application/json"}
    connection.request("POST", COMPLETIONS, bytes(times * MAX_BODY_BYTES + 1), headers)
    answer = connection.getresponse()
    assert answer.status == 413
    assert f"expected {MAX_BODY_BYTES} at most" in answer.read().decode()
    connection.close()


FLOOD_S = 4.0
MAX_GROWTH = 48 << 20
"""Bytes of memory; keeping two and a half KiB of each wrong key would exceed it."""


def test_wrong_keys_hurt_nobody(served: TenantServer) -> None:
    """As many as connections can bring: soon they wait, and those that have a key do not."""
    process = psutil.Process(served.server.pid)
    counted = refused(served, "", 401)
    with Flood(served.server.port) as flood:
        until(lambda: flood.answered >= STRANGERS_PER_MINUTE)
        memory, lines = process.memory_info().rss, len(served.server.log.read_bytes().splitlines())
        begun, before, spent = time.monotonic(), flood.answered, sum(process.cpu_times()[:2])
        time.sleep(FLOOD_S)  # nobody else asks, so that all that the server does is for the flood
        taken, spent = time.monotonic() - begun, sum(process.cpu_times()[:2]) - spent
        rate = (flood.answered - before) / taken
        for case in served.scenario.cases_of(ADAPTERS["shared"]):
            options = {"max_tokens": len(case.expected.tokens), "return_token_ids": True}
            answer = served.complete("zen", "shared", case.prompt, ignore_eos=True, **options)
            assert_status(answer, 200, served)
            assert tuple(answer.json()["choices"][0]["token_ids"]) == case.expected.tokens
    assert flood.others == 0
    print(f"{rate:.0f} wrong keys a second, {100 * spent / taken:.0f} % of a core")
    # In turn, and besides one a connection for each of the longest pauses.
    assert 0 < rate < 1.5 * (STRANGERS_PER_MINUTE / 60 + CONNECTIONS / LONGEST_PAUSE_S)
    assert spent / taken < 0.3
    assert process.memory_info().rss - memory < MAX_GROWTH
    assert len(served.server.log.read_bytes().splitlines()) - lines < 400
    assert refused(served, "", 401) - counted >= flood.answered


def refused(served: TenantServer, tenant: str, status: int) -> float:
    """How many of a tenant's requests metrics say were refused."""
    return metric(served, "refused_requests_total", tenant=tenant, status=str(status))


def metric(served: TenantServer, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(
            served.request("admin", "GET", "/metrics").text
        )
        for sample in family.samples
        if sample.name == f"vllm:lora_{name}" and labels.items() <= sample.labels.items()
    )


def test_refusals_are_counted_by_tenant(served: TenantServer) -> None:
    calls = [
        ("acme", 404, lambda: ask(served, "acme", "completions", "zen-a")),
        ("acme", 403, lambda: served.request("acme", "GET", "/metrics")),
        ("", 403, lambda: served.request("client", "DELETE", "/adapters/zen-a")),
        ("", 401, lambda: ask(served, "wrong", "completions", "zen-a")),
    ]
    for tenant, status, call in calls:
        before = refused(served, tenant, status)
        assert_status(call(), status, served)
        assert refused(served, tenant, status) == before + 1


LONG_PROMPTS = 12


def test_a_tenants_long_texts_keep_no_other_one_from_being_read(served: TenantServer) -> None:
    """One thread makes tokens of all texts, which may take seconds for one, refused or not."""
    body = {"model": "acme-a", "prompt": "t5 " * (1 << 17), "truncate_prompt_tokens": 1}
    with ThreadPoolExecutor(LONG_PROMPTS) as pool:
        flood = [
            pool.submit(served.request, "acme", "POST", "/v1/completions", body)
            for _ in range(LONG_PROMPTS)
        ]
        until(lambda: any(future.done() for future in flood))
        answer = ask(served, "zen", "completions", "zen-a")
        before = sum(future.done() for future in flood)
        assert_status(answer, 200, served)
        for future in flood:
            assert_status(future.result(), 200, served)
    print(f"{before} of {LONG_PROMPTS} came first")
    assert before <= LONG_PROMPTS / 2, f"{before} of {LONG_PROMPTS} came first"


COLD = 32


def test_a_tenant_with_many_cold_adapters_does_not_hold_up_anothers_one(
    served: TenantServer,
) -> None:
    """First they are read when they are registered, and then again, since they do not all fit."""
    adapter = served.scenario.adapters[ADAPTERS["acme-a"]]
    names = [*(f"acme-cold-{number}" for number in range(COLD)), "zen-cold"]
    TENANTS["zen"]["adapters"].append("zen-cold")
    write_tenants(served.tenants, TENANTS)
    for number, name in enumerate(names):
        folder = Path(shutil.copytree(adapter, served.directory / name))
        (folder / FAULT).write_text("slow")
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_alpha"] += number  # equal ones would share their place in memory
        (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        # Each has the engine look at the file again, which takes a second at most.
        until(lambda: "zen-cold" in served.request("zen", "GET", "/v1/models").text)
        limits = httpx.Limits(max_connections=COLD + 1)
        for _ in range(2):
            with (
                httpx.Client(
                    base_url=served.server.url, trust_env=False, timeout=120, limits=limits
                ) as client,
                ThreadPoolExecutor(COLD + 1) as pool,
            ):

                def complete(who: str, name: str) -> httpx.Response:
                    body = {"model": name, "prompt": [5], "max_tokens": 1}
                    key = {"authorization": f"Bearer {KEYS[who]}"}
                    return client.post("/v1/completions", json=body, headers=key)

                flood = [pool.submit(complete, "acme", name) for name in names[:-1]]
                until(lambda: any(future.done() for future in flood))  # noqa: B023
                answer = complete("zen", "zen-cold")
                before = sum(future.done() for future in flood)
                assert_status(answer, 200, served)
                for future in flood:
                    assert_status(future.result(), 200, served)
            print(f"{before} of {COLD} came first")
            # Some are in memory still, and as many as fit there may wait for a slot before it.
            assert before <= COLD / 2, f"{before} of {COLD} came first"
    finally:
        TENANTS["zen"]["adapters"].remove("zen-cold")
        write_tenants(served.tenants, TENANTS)
        for name in names:
            shutil.rmtree(served.directory / name)


def test_the_file_is_read_again_and_a_bad_one_is_not_taken(served: TenantServer) -> None:
    KEYS["late"] = "sk-late"
    assert ask(served, "late", "completions", "shared").status_code == 401
    without_zen = {name: tenant for name, tenant in TENANTS.items() if name != "zen"}
    write_tenants(served.tenants, {**without_zen, "late": {"adapters": ["shared"]}})
    until(lambda: ask(served, "late", "completions", "shared").status_code == 200)
    assert ask(served, "zen", "completions", "zen-a").status_code == 401
    served.tenants.write_text("tenants: {acme: {kyes: []}}")
    complaint = "tenants.acme.kyes: found an unknown key"

    def is_reported() -> bool:
        assert ask(served, "late", "completions", "shared").status_code == 200
        return complaint in served.server.log.read_text()

    until(is_reported)
    assert "The tenants stay as they were" in served.server.log.read_text()
    write_tenants(served.tenants, TENANTS)
    until(lambda: ask(served, "zen", "completions", "zen-a").status_code == 200)
    assert ask(served, "late", "completions", "shared").status_code == 401
