"""What passes between HTTP and the routes: headers in, the adapter's name out."""

import asyncio
from argparse import Namespace

import pytest

pytest.importorskip("starlette")

from vllm_multilora.integration.routed_calls import (
    RoutedCallMiddleware,
    asks_for_routes,
    current_call,
)


def call(app, scope):
    """The messages that an application sends behind the middleware."""
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(RoutedCallMiddleware(app)(scope, None, send))
    return sent


async def answer(send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("adapter", "headers"),
    [
        (None, []),
        ("acme/v2 beta", [(b"x-multilora-adapter", b"acme/v2 beta")]),
        ("médical", [(b"x-multilora-adapter", b"m%C3%A9dical")]),
        ("a\r\nset-cookie: b", [(b"x-multilora-adapter", b"a%0D%0Aset-cookie: b")]),
    ],
    ids=["no-route", "plain", "not-ascii", "line-break"],
)
def test_the_answer_names_the_adapter_that_a_task_of_the_request_chose(adapter, headers):
    async def app(scope, receive, send):
        async def work():
            current_call.get().adapter = adapter

        await asyncio.create_task(work())  # vLLM's handlers run in tasks of their own
        await answer(send)

    assert call(app, {"type": "http", "headers": []})[0]["headers"] == headers


def test_the_request_s_headers_are_at_hand():
    found = []

    async def app(scope, receive, send):
        found.append(current_call.get().headers.get("accept-language"))
        await answer(send)

    call(app, {"type": "http", "headers": [(b"Accept-Language".lower(), b"fr")]})
    assert found == ["fr"]


def test_what_is_no_http_passes():
    async def app(scope, receive, send):
        assert current_call.get() is None
        await send({"type": "websocket.accept"})

    assert call(app, {"type": "websocket"}) == [{"type": "websocket.accept"}]


@pytest.mark.parametrize(
    ("additional", "asks"),
    [
        (None, False),
        ({}, False),
        ({"multilora": {"backend": "auto"}}, False),
        ({"multilora": {"routes": "routes.yaml"}}, True),
    ],
)
def test_only_a_server_with_routes_gets_the_middleware(additional, asks):
    assert asks_for_routes(Namespace(additional_config=additional)) is asks
