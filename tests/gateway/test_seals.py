"""On a server with tenants each call that passes has a seal, and no answer shows one."""

import asyncio
import json

import pytest

pytest.importorskip("vllm")

from starlette.datastructures import Headers

from tests.gateway.calls import ACME, ADMIN, CLIENT, call, parts_of, write
from vllm_multilora.gateway.keys.access import Access
from vllm_multilora.gateway.keys.middleware import AccessMiddleware
from vllm_multilora.integration.seals import SALT_CHARACTERS, Seal, opened
from vllm_multilora.integration.server.requests.callers import tenant_salt

SECRET = "the secret of this start"
COHERE = "/cohere/v2/chat"
OF_TENANTS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
    *("/v1/embeddings", "/pooling", "/score", "/rerank", "/classify", "/invocations"),
)
OF_OPERATORS = (*OF_TENANTS, "/inference/v1/generate", "/generative_scoring", "/v1/systemone")


def short_salt(secret, tenant, own):
    known = tenant or own is not None
    return tenant_salt(secret, tenant, own)[:SALT_CHARACTERS] if known else ""


class Server:
    """Keeps what it was asked, and answers with the request's id as vLLM does."""

    def __init__(self):
        self.body = self.id = None

    async def __call__(self, scope, receive, send):
        content, more = b"", True
        while more:
            message = await receive()
            content += message["body"]
            more = message.get("more_body", False)
        self.body = json.loads(content) if content[:1] == b"{" else content
        self.id = Headers(scope=scope).get("x-request-id")
        body = json.dumps({"id": f"chatcmpl-{self.id}", "text": "a"}).encode()
        headers = [(b"content-length", str(len(body)).encode()), (b"x-none", b"")]
        if self.id:
            headers[1] = (b"x-request-id", self.id.encode())
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def access(tmp_path):
    path = tmp_path / "tenants.json"
    write(path, {"resident": 9}, allow=["media"])
    return Access(api_keys=[CLIENT], admin_keys=[ADMIN], tenants_path=str(path), secret=SECRET)


def ask(access, path, key, body, **headers):
    """What the server was asked, and the answer's messages."""
    server, sent = Server(), []

    async def keep(scope, receive, send):
        async def send_kept(message):
            sent.append(message)
            await send(message)

        await AccessMiddleware(server, access)(scope, receive, send_kept)

    more = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(call(None, None, path, key, acceptor=keep, more=more, bodies=parts_of(body)))
    return server, sent


def seal_of(server):
    return opened(SECRET, server.body.get("cache_salt"))


@pytest.mark.parametrize("path", OF_TENANTS)
def test_tenants_body_gets_the_tenants_seal(access, path):
    server, _ = ask(access, path, ACME, b'{"model": "acme-a"}')
    assert seal_of(server) == Seal("acme", 1.0, 9, short_salt(SECRET, "acme", None))
    assert server.body["model"] == "acme-a"


@pytest.mark.parametrize("path", OF_OPERATORS)
@pytest.mark.parametrize("key", [ADMIN, CLIENT], ids=["operator", "client"])
def test_body_of_others_gets_a_seal_without_a_tenant(access, path, key):
    server, _ = ask(access, path, key, b'{"model": "acme-a"}')
    assert seal_of(server) == Seal()


OWN = {
    "none": (b'{"model": "m", "cache_salt": null}', None),
    "own": (b'{"cache_salt": "mine", "model": "m"}', "mine"),
    "twice": (b'{"cache_salt": "other", "model": "m", "cache_salt": "mine"}', "mine"),
    "escaped": (rb'{"\u0063ache_salt": "mine", "model": "m"}', "mine"),
    "utf-16": ('{"cache_salt": "mine", "model": "m"}'.encode("utf-16"), "mine"),
    "utf-16-without": ('{"model": "m"}'.encode("utf-16"), None),
    "space": (b' \n {"model": "m"}', None),
    "another-tenants-seal": (
        b'{"model": "m", "cache_salt": "zen:1:::AAAAAAAAAAAAAAAA"}',
        "zen:1:::AAAAAAAAAAAAAAAA",
    ),
}


@pytest.mark.parametrize(("body", "own"), OWN.values(), ids=OWN)
def test_own_salt_divides_the_cache_and_never_stays_in_the_body(access, body, own):
    for key, tenant in ((ACME, "acme"), (CLIENT, "")):
        server, _ = ask(access, "/v1/completions", key, body)
        assert seal_of(server).tenant == tenant
        assert seal_of(server).salt == short_salt(SECRET, tenant, own)
        assert server.body["model"] == "m"


@pytest.mark.parametrize("own", ["", "a@b", "x" * 129])
def test_salt_that_vllm_refuses_is_left_for_vllm_to_refuse(access, own):
    body = json.dumps({"cache_salt": own}).encode()
    for key in (ACME, CLIENT):
        server, _ = ask(access, "/v1/completions", key, body)
        assert server.body["cache_salt"] == own


def test_empty_object_gets_a_seal(access):
    for key in (ACME, CLIENT):
        server, _ = ask(access, "/v1/completions", key, b" { } ")
        assert [*server.body] == ["cache_salt"]


@pytest.mark.parametrize("key", [ACME, ADMIN], ids=["tenant", "operator"])
@pytest.mark.parametrize("path", [COHERE, "/v2/embed", "/v1/audio/transcriptions"])
@pytest.mark.parametrize("own", ["mine", "~mine~", None])
def test_seal_of_a_route_without_salts_is_in_its_id_and_not_in_its_answer(access, path, key, own):
    headers = {} if own is None else {"x-request-id": own}
    server, (start, body) = ask(access, path, key, b'{"model": "acme-a"}', **headers)
    own_id, text, rest = server.id.split("~")
    assert opened(SECRET, text).tenant == ("acme" if key == ACME else "")
    assert rest == ""
    assert own is None or own_id.strip("-") == "mine"
    assert json.loads(body["body"])["id"] == f"chatcmpl-{own_id}"
    headers = Headers(scope=start)
    assert headers["x-request-id"] == own_id
    assert headers["content-length"] == str(len(body["body"]))
    assert text not in repr((start, body))


@pytest.mark.parametrize("path", ["/score", "/v1/rerank"])
def test_call_that_vllm_ends_by_its_id_has_its_tenants_seal_there_too(access, path):
    """Else another tenant's ends it, whose client has chosen the same id and goes."""
    server, _ = ask(access, path, ACME, b'{"model": "acme-a"}', **{"x-request-id": "mine"})
    own_id, text, _ = server.id.split("~")
    assert own_id == "mine"
    assert opened(SECRET, text).tenant == seal_of(server).tenant == "acme"


def test_without_tenants_no_call_has_a_seal(tmp_path):
    access = Access(api_keys=[CLIENT], secret=SECRET)
    for path in ("/v1/completions", COHERE):
        server, _ = ask(access, path, CLIENT, b'{"model": "m"}')
        assert (server.body, server.id) == ({"model": "m"}, None)


@pytest.mark.parametrize("key", [ACME, ADMIN], ids=["tenant", "operator"])
def test_websocket_on_a_server_with_tenants_is_refused(access, key):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": "/v1/realtime",
        "headers": [(b"authorization", f"Bearer {key}".encode())],
        "extensions": {"websocket.http.response": {}},
    }
    asyncio.run(AccessMiddleware(Server(), access)(scope, None, send))
    assert sent[0]["status"] == 403
