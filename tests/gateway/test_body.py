"""The bodies of tenants' calls: read within limits, and passed on as they came."""

import asyncio
import itertools
import json
import time

import pytest

pytest.importorskip("vllm")

from starlette.requests import Request

from tests.gateway.calls import ACME, CLIENT, NO_BODY, App, call, parts_of, write
from vllm_multilora.gateway.body import (
    DROPPED_BODIES,
    MAX_BODY_BYTES,
    MAX_MEDIA_BODY_BYTES,
    MAX_NUMBERS,
    MAX_TOKENS_REPORTED,
    LargeBodyError,
    read_body,
)
from vllm_multilora.gateway.fields import MAX_TEXT
from vllm_multilora.gateway.keys.access import Access
from vllm_multilora.gateway.table import TENANT_ROUTES
from vllm_multilora.integration.server.requests.callers import Caller
from vllm_multilora.tenants.limits import Account
from vllm_multilora.tenants.rules import Role
from vllm_multilora.tenants.tenant import Tenant


@pytest.fixture
def tenants(tmp_path):
    path = tmp_path / "tenants.json"
    write(path, {})
    return path


def tenant(name, *allow):
    account = Account(Tenant(name, allow=frozenset(allow)))
    return Caller(Role.TENANT, account=account, secret="a secret")


TOKENS = b",".join([b"1"] * 100_000)
CALLS = "/v1/completions"
AUDIO = "/v1/audio/transcriptions"
BODIES = {
    "tokens": (CALLS, b'{"prompt": [%s]}' % TOKENS, 200),
    "text": (CALLS, b'{"prompt": "%s"}' % (rb"{,[\"" * 40_000), 200),
    "text-without-end": (CALLS, b'{"prompt": "%s' % (b"," * 40_000), 400),
    "empty": (CALLS, b"", 400),
    "list": (CALLS, b"[]", 400),
    "long-number": (CALLS, b'{"seed": %s}' % (b"9" * 5_000), 400),
    "lists": (CALLS, b'{"prompt": [%s[]]}' % (b"[]," * 20_000), 413),
    "texts": (CALLS, b'{"prompt": [%s""]}' % (b'"",' * 40_000), 413),
    "lists-in-utf-16": (
        CALLS,
        # A byte of this character is a quotation mark.
        ('{"user": "\u2200", "prompt": [%s[]]}' % ("[]," * 20_000)).encode("utf-16"),
        413,
    ),
    "tokens-in-utf-16": (CALLS, (b'{"prompt": [%s]}' % TOKENS).decode().encode("utf-16"), 200),
    "messages": ("/v1/messages", b'{"messages": [%s{}]}' % (b"{}," * 20_000), 413),
    "fields": (CALLS, b'{%s"a": 0}' % (b'"a": 0,' * 40_000), 413),
    "tokens-to-decode": ("/detokenize", b'{"tokens": [%s1]}' % (b"1," * MAX_TOKENS_REPORTED), 200),
    "more-tokens-to-decode": ("/detokenize", b"[%s1]" % (b"1," * (MAX_TOKENS_REPORTED + 1)), 413),
    "numbers-of-any-kind": ("/invocations", b'{"messages": [%s]}' % TOKENS, 413),
    "bytes": (CALLS, b'{"prompt": "%s"}' % (b"a" * (MAX_BODY_BYTES - 14)), 200),
    "more-bytes": (CALLS, b'{"prompt": "%s"}' % (b"a" * (MAX_BODY_BYTES - 13)), 413),
    "many-more-bytes": (CALLS, bytes(MAX_BODY_BYTES * DROPPED_BODIES), 413),
}


def completion(echo, size, **fields):
    """A body that asks for its prompt to be repeated, and how often or with what."""
    asked = "".join(f'"{name}": {value}, ' for name, value in fields.items())
    return f'{{"echo": {echo}, {asked}"prompt": "{"a" * size}"}}'.encode()


MIB = 1 << 20
BODIES |= {
    "echo-of-few": (CALLS, completion("true", MIB, n=16), 200),
    "echo-of-many": (CALLS, completion("true", MIB, n=18), 400),
    "echo-in-words": (CALLS, completion('"yes"', MIB, n="18.0"), 400),
    "echo-of-a-text": (CALLS, completion("1", MIB, n='"18"'), 400),
    "no-echo-of-many": (CALLS, completion("false", MIB, n=18), 400),
    "echo-null": (CALLS, completion("null", MIB, n=16), 200),
    "echo-of-one": (CALLS, completion("true", MIB, n="null"), 200),
    "scores-few": (CALLS, completion("true", 30_000, logprobs=1), 200),
    "scores-many": (CALLS, completion("true", 30_000, logprobs=2), 400),
    "scores-all": (CALLS, completion("true", 30_000, logprobs=-1), 400),
    "scores-a-text": (CALLS, completion("true", 30_000, logprobs='"1"'), 400),
    "scores-none": (CALLS, completion("true", 30_000, logprobs="null"), 200),
    "scores-of-no-echo": (CALLS, completion("false", 30_000, logprobs=20), 200),
}
CHATS = "/v1/chat/completions"
IMAGE = b'{"messages": [{"role": "user", "content": [{"image_url": {"url": "data:%s"}}]}]}'
MEDIA_BODIES = {
    "image": (CHATS, IMAGE % (b"a" * (MAX_MEDIA_BODY_BYTES - len(IMAGE) + 2)), 200),
    "more-of-an-image": (CHATS, IMAGE % (b"a" * (MAX_MEDIA_BODY_BYTES - len(IMAGE) + 3)), 413),
    "text": (CALLS, b'{"prompt": "%s"}' % (b"a" * MAX_TEXT), 200),
    "longer-text": (CALLS, b'{"prompt": "%s"}' % (b"a" * (MAX_TEXT + 1)), 400),
    "more-bytes": (CALLS, bytes(MAX_MEDIA_BODY_BYTES + 1), 413),
    "many-tokens": (CALLS, b'{"prompt": [%s1]}' % (b"1," * (MAX_NUMBERS + 1)), 413),
    "commas-in-a-recording": (AUDIO, b"," * 40_000, 200),
    "recording": (AUDIO, bytes(MAX_MEDIA_BODY_BYTES), 200),
    "longer-recording": (AUDIO, bytes(MAX_MEDIA_BODY_BYTES + 1), 413),
}


def assert_answered(tenants, path, body, status):
    """As a tenant's; the same body of somebody else is vLLM's affair."""
    access, seen = Access(api_keys=[CLIENT], tenants_path=str(tenants)), []

    async def reading(scope, receive, send):
        seen.append(await Request(scope, receive).body())
        await App()(scope, receive, send)

    for key, expected in ((CLIENT, 200), (ACME, status)):
        start = asyncio.run(call(reading, access, path, key, bodies=parts_of(body)))
        assert start["status"] == expected
    assert len(seen) == (2 if status == 200 else 1)
    assert seen[-1] == body or without_seal(seen[-1]) == json.loads(body)


def without_seal(body):
    """What a body holds besides the seal that the gateway has put in it."""
    content = json.loads(body)
    del content["cache_salt"]
    return content


@pytest.mark.parametrize(("path", "body", "status"), BODIES.values(), ids=BODIES)
def test_tenants_body_is_read_within_limits(tenants, path, body, status):
    assert_answered(tenants, path, body, status)


@pytest.mark.parametrize(("path", "body", "status"), MEDIA_BODIES.values(), ids=MEDIA_BODIES)
def test_body_may_be_larger_where_media_are_allowed(tenants, path, body, status):
    write(tenants, {}, allow=["media"])
    assert_answered(tenants, path, body, status)


@pytest.mark.parametrize("parts", [DROPPED_BODIES, 10 * DROPPED_BODIES], ids=["few", "many"])
def test_rest_of_a_large_body_is_dropped_up_to_a_limit(parts):
    given = 0

    async def receive():
        nonlocal given
        given += 1
        return {"type": "http.request", "body": bytes(MAX_BODY_BYTES), "more_body": given < parts}

    with pytest.raises(LargeBodyError):
        asyncio.run(read_body(receive, TENANT_ROUTES[CALLS], tenant("acme"), [].append))
    assert given == min(parts, DROPPED_BODIES + 1)


@pytest.mark.parametrize("short", [b'""', b'1""'], ids=["texts", "numbers-and-texts"])
def test_many_short_values_take_no_longer_than_one_long_one(short):
    """Nobody is answered meanwhile: half a minute, for 64 MiB of the shortest."""

    def seconds(body):
        async def receive():
            return {"type": "http.request", "body": b"[{}," * 40_000 + body}

        begun = time.process_time()
        with pytest.raises(LargeBodyError):
            asyncio.run(
                read_body(receive, TENANT_ROUTES[CALLS], tenant("acme", "media"), [].append)
            )
        return time.process_time() - begun

    size = 16 << 20
    assert seconds(short * (size // len(short))) < 5 * seconds(b'"%s"' % (b"a" * size))


RESPONSES = "/v1/responses"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"input": "a"}', {"input": "a", "store": False}),
        (b'{"input": "a", "store": null}', {"input": "a", "store": False}),
        (b'{"input":  "a", "store": false}', {"input": "a", "store": False}),
    ],
    ids=["left-out", "null", "false"],
)
def test_tenants_response_is_not_stored(tenants, body, expected):
    write(tenants, {})
    seen = []

    async def reading(scope, receive, send):
        seen.append(without_seal(await Request(scope, receive).body()))
        await App()(scope, receive, send)

    access = Access(tenants_path=str(tenants))
    start = asyncio.run(call(reading, access, RESPONSES, ACME, bodies=parts_of(body)))
    assert (start["status"], seen) == (200, [expected])


@pytest.mark.parametrize("name", [b"x-request-id", b"traceparent", b"tracestate"])
def test_header_that_comes_back_with_each_token_is_short(tenants, name):
    access = Access(api_keys=[CLIENT], tenants_path=str(tenants))
    for key, length, status in ((CLIENT, 9_999, 200), (ACME, 1_024, 200), (ACME, 1_025, 400)):
        more = ((name, b"a" * length),)
        assert asyncio.run(call(App(), access, CALLS, key, more=more))["status"] == status


def test_a_tenants_client_that_goes_before_its_body_has_come_is_gone(tenants):
    access, seen = Access(tenants_path=str(tenants)), []

    async def reading(scope, receive, send):
        seen.append(await receive())
        await App()(scope, receive, send)

    bodies = [parts_of(b"ab")[0], {"type": "http.disconnect"}]
    asyncio.run(call(reading, access, CALLS, ACME, bodies=bodies))
    assert seen == [{"type": "http.disconnect"}]


def test_others_have_their_turns_while_a_tenants_form_is_taken_apart(tenants):
    """By Starlette, which may look at each byte: 64 MiB took it twenty seconds."""
    write(tenants, {}, allow=["media"])
    part = {"type": "http.request", "body": b"&" * 100, "more_body": True}
    headers = ((b"content-type", b"application/x-www-form-urlencoded"),)
    found = []

    async def app(scope, receive, send):
        turns = itertools.count()

        async def others():
            while True:
                next(turns)
                await asyncio.sleep(0)

        other = asyncio.create_task(others())
        await asyncio.sleep(0)
        before = next(turns)
        await Request(scope, receive).form()
        found.append(next(turns) - before)
        other.cancel()
        await App()(scope, receive, send)

    bodies, path = [part] * 9 + [NO_BODY], AUDIO
    asyncio.run(
        call(app, Access(tenants_path=str(tenants)), path, ACME, more=headers, bodies=bodies)
    )
    assert found[0] >= len(bodies)
