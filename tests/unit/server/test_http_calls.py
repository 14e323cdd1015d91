"""What passes between HTTP and adapters: headers in, the adapter's name and version out."""

import asyncio
import importlib
import json
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")


from vllm_multilora.gateway.answers import HttpCallMiddleware
from vllm_multilora.integration.patching.tables.gateway_seams import GATEWAY_SEAMS
from vllm_multilora.integration.server.requests.http_calls import MAX_ERROR, current_call

DIGEST = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4
SHOWN, OTHER_SHOWN = DIGEST[:16], OTHER[:16]
FRENCH = SimpleNamespace(lora_name="french")


def call(app, scope=None):
    """The messages that an application sends behind the middleware."""
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(
        HttpCallMiddleware(app)(scope or {"type": "http", "path": "/", "headers": []}, None, send)
    )
    return sent


async def answer(send, *parts, kind="application/json", status=200):
    headers = [(b"content-type", kind.encode())]
    if len(parts) == 1:
        headers.append((b"content-length", str(len(parts[0])).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for part in parts:
        if callable(part):
            part()
        else:
            await send(
                {"type": "http.response.body", "body": part, "more_body": part is not parts[-1]}
            )


def bind(digest=DIGEST, ran=None):
    """As an API server does with a request for an adapter."""
    found = current_call.get()
    found.adapter, found.lora, found.digest, found.ran = "french", FRENCH, digest, ran


def run(digest):
    """As an engine's first output does."""
    current_call.get().ran = digest


def headers_of(messages):
    return {key.decode(): value.decode() for key, value in messages[0]["headers"]}


@pytest.mark.parametrize(("given", "sent"), [([], "2"), ([(b"retry-after", b"9")], "9")])
def test_answer_of_a_busy_server_says_when_to_ask_again(given, sent):
    async def busy(scope, receive, send):
        await send({"type": "http.response.start", "status": 503, "headers": given})

    assert headers_of(call(busy)) == {"retry-after": sent}


@pytest.mark.parametrize(
    ("adapter", "header"),
    [
        (None, None),
        ("acme/v2 beta", "acme/v2 beta"),
        ("médical", "m%C3%A9dical"),
        ("a\r\nset-cookie: b", "a%0D%0Aset-cookie: b"),
        (" a b ", "%20a%20b%20"),
        ("a-b._~/:@+*c", "a-b._~/:@+*c"),
        ("team#1, (100%)", "team%231%2C %28100%25%29"),
    ],
    ids=[
        *("no-adapter", "plain", "not-ascii", "line-break", "spaces-around"),
        *("as-it-is", "other-punctuation"),
    ],
)
def test_the_answer_names_the_adapter_that_a_task_of_the_request_chose(adapter, header):
    async def app(scope, receive, send):
        async def work():
            current_call.get().adapter = adapter

        await asyncio.create_task(work())  # vLLM's handlers run in tasks of their own
        await answer(send, b"{}")

    assert headers_of(call(app)).get("x-multilora-adapter") == header


@pytest.mark.parametrize("body", [b'{"id":"x","usage":{}}', b"{}"], ids=["answer", "empty"])
def test_an_answer_names_what_has_computed_it(body):
    async def app(scope, receive, send):
        bind(ran=OTHER)  # its files have changed since it was registered
        await answer(send, body)

    sent = call(app)
    whole = json.loads(sent[1]["body"])
    assert whole.pop("multilora") == {"adapter": "french", "version": OTHER_SHOWN}
    assert whole == json.loads(body)
    headers = headers_of(sent)
    assert headers["x-multilora-version"] == OTHER_SHOWN
    assert int(headers["content-length"]) == len(sent[1]["body"])


def test_a_stream_names_its_version_first_and_what_computes_it_once_that_is_known():
    first, second, third = b"event: created\ndata: {}\n\n", b'data: {"a":1}\n\n', b"data: {}\n\n"

    async def app(scope, receive, send):
        bind()
        await answer(
            send, first, lambda: run(OTHER), b": ping", second, third, kind="text/event-stream"
        )

    sent = call(app)
    assert headers_of(sent)["x-multilora-version"] == SHOWN
    assert [message["body"] for message in sent[1:]] == [
        first,
        b": ping",
        b'data: {"multilora":{"adapter":"french","version":"%s"},"a":1}\n\n' % OTHER_SHOWN.encode(),
        third,
    ]


@pytest.mark.parametrize(
    ("kind", "status", "ran"),
    [
        ("application/json", 200, None),
        ("application/json", 404, DIGEST),
        ("audio/wav", 200, DIGEST),
    ],
    ids=["nothing-ran", "error", "no-json"],
)
def test_other_answers_stay_as_they_are(kind, status, ran):
    async def app(scope, receive, send):
        bind(ran=ran)
        await answer(send, b'{"a":1}', kind=kind, status=status)

    sent = call(app)
    assert sent[1]["body"] == b'{"a":1}'
    assert headers_of(sent)["content-length"] == "7"


@pytest.mark.parametrize(
    "parts",
    [(lambda: run(DIGEST), b"[1]"), (b'{"a":"', lambda: run(DIGEST), b'data: {"}')],
    ids=["no-object", "a-later-part"],
)
def test_nothing_is_put_into_json_but_at_the_beginning_of_an_object(parts):
    async def app(scope, receive, send):
        bind()
        await answer(send, *parts)

    said = [part for part in parts if isinstance(part, bytes)]
    assert [message["body"] for message in call(app)[1:]] == said


def test_websocket_has_a_call_without_an_answer():
    """Texts of its errors may repeat what its client has sent, as those of answers do."""

    async def app(scope, receive, send):
        assert current_call.get().path == "/v1/realtime"
        await send({"type": "websocket.accept"})

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    assert call(app, scope) == [{"type": "websocket.accept"}]


RUNS = {
    "path": "/a" * 4_096,
    "paths": ("/a" * 120 + " ") * 1_000,
    "spaces": "\n" * 16_000 + 'File "x", line',
    "no-end": "/a" * 500_000,
}


@pytest.mark.smoke
@pytest.mark.parametrize("text", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("part", ["error_response", "handlers.validation"])
def test_an_error_that_repeats_what_a_client_has_sent_takes_no_time(part, text):
    """vLLM looks for paths in it, by expressions that take the third power of its length."""
    vllm = importlib.import_module(f"vllm.entrypoints.serve.exception_handling.{part}")
    assert not GATEWAY_SEAMS.missing({"error-texts", "validation-error-texts"})
    begun = time.thread_time()
    shown = behind(lambda: vllm.sanitize_message(f"No such thing: {text} (/home/me/secret)"))
    assert time.thread_time() - begun < 1.0
    assert shown.startswith("No such thing: ")
    assert len(shown) <= MAX_ERROR + len("...")


def test_an_errors_text_is_vllms_otherwise():
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    text = f"The file /home/me/model/config.json has {'/a' * 100} \n in it"
    answers = [behind(lambda: create_error_response(text)), create_error_response(text)]
    assert answers[0] == answers[1]
    assert answers[0].error.message == f"The file <path> has {'/a' * 100} \n in it"


def behind(work):
    """What some work returns while a request is answered."""
    found = []

    async def app(*_):
        found.append(work())

    call(app)
    return found[0]
