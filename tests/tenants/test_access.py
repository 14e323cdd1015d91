"""The door of an API server, without the server behind it."""

import asyncio
import importlib
import json
import os
import sys
import threading
from argparse import Namespace
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from types import SimpleNamespace
from unittest.mock import AsyncMock

import httpx
import pytest

pytest.importorskip("vllm")

from starlette.datastructures import Headers
from starlette.middleware.base import BaseHTTPMiddleware
from vllm.config import StructuredOutputsConfig
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.exceptions import GracefulHTTPError
from vllm.usage.usage_lib import UsageContext

from tests.event_loop import in_event_loop
from tests.gateway.calls import ACME, ADMIN, CLIENT, App, call, write
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.documents import DocumentError
from vllm_multilora.errors import ConfigError
from vllm_multilora.gateway.endpoints import error_answer
from vllm_multilora.gateway.keys import access as access_module
from vllm_multilora.gateway.keys import middleware
from vllm_multilora.gateway.keys.access import Access, access_for
from vllm_multilora.gateway.keys.middleware import AccessMiddleware, presented_key
from vllm_multilora.gateway.limits import tenant_turns
from vllm_multilora.gateway.limits.tenant_turns import turn_of
from vllm_multilora.integration.api_server import failure_delivery
from vllm_multilora.integration.api_server.failure_delivery import process_outputs
from vllm_multilora.integration.engine_config import check_access
from vllm_multilora.integration.failed_requests import without_folders
from vllm_multilora.integration.seals import SECRET_VARIABLE
from vllm_multilora.integration.server.requests.metering import (
    METER,
    ServerMeter,
    end_all_at_shutdown,
)
from vllm_multilora.integration.server.settings import start_checks
from vllm_multilora.integration.server.settings.gateway_activation import mount_gateway
from vllm_multilora.integration.server.settings.start_checks import read_admin_keys
from vllm_multilora.store.store_launch import environment
from vllm_multilora.tenants.keys import ADMIN_KEY_VARIABLE, stored
from vllm_multilora.tenants.limits import Account, Pace, TokenBucket
from vllm_multilora.tenants.rules import Endpoint, Locks, Role
from vllm_multilora.tenants.tenant import Tenant, TenantLimits, Tenants


@pytest.fixture
def tenants(tmp_path):
    path = tmp_path / "tenants.json"
    write(path, {})
    return path


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/v1/chat/completions", {"error": {"code", "message", "param", "type"}}),
        ("/v1/messages/render", {"error": {"code", "message", "param", "type"}}),
        ("/v1/messages", {"type": "error", "error": {"message", "type"}}),
        ("/v1/messages/count_tokens", {"type": "error", "error": {"message", "type"}}),
        ("/cohere/v2/chat", {"message": "The request has no valid key"}),
    ],
)
def test_errors_have_the_shape_of_the_api_that_was_called(path, keys):
    answer = error_answer(HTTPStatus.UNAUTHORIZED, "The request has no valid key", path=path)
    assert answer.status_code == HTTPStatus.UNAUTHORIZED
    body = json.loads(answer.body)
    if "error" in body:
        assert body["error"]["message"] == "The request has no valid key"
        body["error"] = body["error"].keys()
    assert body == keys


@pytest.mark.parametrize("key", [CLIENT, ACME])
def test_whoever_may_not_load_adapters_learns_which_key_may(tenants, key):
    access = Access(api_keys=[CLIENT], admin_keys=[ADMIN], tenants_path=str(tenants))
    transport = httpx.ASGITransport(AccessMiddleware(App(), access))

    async def load():
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/v1/load_lora_adapter", headers={"x-api-key": key})

    answer = asyncio.run(load())
    assert answer.status_code == HTTPStatus.FORBIDDEN
    assert "expected an admin key" in answer.json()["error"]["message"]


@pytest.mark.parametrize("header", ["endpoint-load-metrics-format", "x-data-parallel-rank"])
def test_a_tenant_neither_gets_metrics_nor_chooses_an_engine(tenants, header):
    """As vLLM has whoever sends a header."""
    seen = []

    class Reading(App):
        async def __call__(self, scope, receive, send):
            seen.append(header in Headers(scope=scope))
            await super().__call__(scope, receive, send)

    access = Access(api_keys=[CLIENT], tenants_path=str(tenants))
    for key in (CLIENT, ACME):
        more = [(header.encode(), b"JSON")]
        asyncio.run(call(Reading(), access, "/v1/completions", key, more=more))
    assert seen == [True, False]


def test_the_api_key_is_the_operators_where_there_is_no_other(tenants):
    access = Access(api_keys=[CLIENT], tenants_path=str(tenants))
    assert access.caller(CLIENT).role is Role.OPERATOR


def test_folders_are_shown_to_operators_where_there_are_any():
    assert Locks(api_key=True, admin_key=False, tenants=False).shows_folders(Role.STRANGER)
    for api_key, tenants in ((False, False), (True, False), (True, True)):
        locks = Locks(api_key=api_key, admin_key=True, tenants=tenants)
        assert [role for role in Role if locks.shows_folders(role)] == [Role.OPERATOR]


@pytest.fixture
def pauses(monkeypatch):
    """What answers wait, in seconds; no time passes."""
    seconds = []

    async def sleep(duration):
        seconds.append(duration)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(Access, "watch", lambda access: None)  # which sleeps, too
    still = partial(TokenBucket, clock=lambda: 100.0)
    monkeypatch.setattr(middleware, "TokenBucket", still)
    return seconds


async def status(access, key, path="/v1/completions", method="POST", acceptor=None):
    return (await call(App(), access, path, key, method, acceptor=acceptor))["status"]


@in_event_loop
async def test_many_wrong_keys_wait_for_their_answers_and_others_do_not(tenants, pauses):
    """At one time: a minute's worth is answered at once, then one each second or after 5 s."""
    access = Access(admin_keys=[ADMIN], tenants_path=str(tenants))
    acceptor = AccessMiddleware(App(), access, strangers_per_minute=60)
    for number in range(200):
        assert await status(access, f"sk-{number}", acceptor=acceptor) == 401
    before = len(pauses)
    assert await status(access, ADMIN, acceptor=acceptor) == 200
    assert len(pauses) == before
    assert pauses == [1.0, 2.0, 3.0, 4.0, *[5.0] * 136]


@in_event_loop
async def test_wrong_keys_that_vllm_itself_refuses_wait_and_are_counted(monkeypatch, pauses):
    """Without tenants, its own check of the API key answers for most paths."""
    counted = []
    monkeypatch.setattr(middleware.COUNTS, "count_refused", lambda *who: counted.append(who))
    access = Access(api_keys=[CLIENT], admin_keys=[ADMIN])
    app = AuthenticationMiddleware(App(), tokens=[CLIENT])
    acceptor = AccessMiddleware(app, access, strangers_per_minute=60)
    for number in range(63):
        assert await status(access, f"sk-{number}", acceptor=acceptor) == 401
    assert await status(access, "sk-wrong", "/tokenize", acceptor=acceptor) == 200
    assert await status(access, CLIENT, acceptor=acceptor) == 200
    assert pauses == [1.0, 2.0, 3.0]
    assert counted == [(None, 401)] * 63


@pytest.mark.parametrize("way", ["forbidden", "too-many"])
@in_event_loop
async def test_a_tenants_requests_that_have_no_turn_wait_where_there_are_many(tenants, pauses, way):
    """Limits do not count them, and each takes as long to answer as a call takes to begin."""
    write(tenants, {"running": 1, "waiting": 0}, zen={"keys": [stored("sk-zen")]})
    access = Access(tenants_path=str(tenants))
    path, method, expected = {
        "forbidden": ("/metrics", "GET", 403),
        "too-many": ("/v1/completions", "POST", 429),
    }[way]
    account = access.caller(ACME).account
    account.without_turn = TokenBucket(60, lambda: 100.0)
    account.begin()
    for _ in range(200):
        assert await status(access, ACME, path, method) == expected
    before = len(pauses)
    account.end()
    assert await status(access, ACME) == 200
    assert await status(access, "sk-zen", path, method) in (expected, 200)
    assert len(pauses) == before
    assert pauses == [1.0, 2.0, 3.0, 4.0, *[5.0] * 136]


go_on = partial(asyncio.sleep, 0)
"""Lets others work, also where sleep is told and not slept."""


@pytest.fixture
def slept(monkeypatch):
    """What is slept, in seconds, without taking any; and the clock of a thread, which stands."""
    seconds, clock = [], SimpleNamespace(now=0.0)

    async def sleep(duration):
        seconds.append(round(duration, 6))
        await go_on()

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(Access, "watch", lambda access: None)  # which sleeps, too
    thread = SimpleNamespace(thread_time=lambda: clock.now)
    monkeypatch.setattr(tenant_turns, "time", thread)
    return seconds, clock


@pytest.mark.parametrize("path", ["/v1/models", "/v1/lora_adapters"])
@in_event_loop
async def test_a_tenants_lists_take_a_small_part_of_the_time(tenants, slept, path):
    """Some have thousands of adapters, and list them on many connections at once."""
    done, clock = slept

    async def app(scope, receive, send):
        clock.now += 0.004
        await go_on()  # others are at work meanwhile: their time is not the list's
        clock.now += 0.006
        done.append("listed")
        await App()(scope, receive, send)

    async def work():
        while True:
            clock.now += 100.0
            await go_on()

    access = Access(admin_keys=[ADMIN], tenants_path=str(tenants))
    access.caller(ACME).account.listing = defaultdict(lambda: Pace(lambda: 0.0))

    async def ask(*keys):
        others = asyncio.create_task(work())
        await asyncio.gather(*(call(app, access, path, key, "GET") for key in keys))
        others.cancel()

    await ask(ACME, ACME, ADMIN)
    assert done == ["listed", "listed", 0.2, "listed"]
    done.clear()
    await ask(ACME, ACME)
    assert done == [0.2, "listed", 0.2, "listed"]


@in_event_loop
async def test_a_list_waits_for_no_reader_of_another_one(tenants):
    """One that has gone to sleep may not have been noticed for hours."""
    access = Access(tenants_path=str(tenants))
    acceptor = AccessMiddleware(App(), access)
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/models",
        "headers": [(b"authorization", f"Bearer {ACME}".encode())],
    }
    never = asyncio.Event()
    stuck = asyncio.create_task(acceptor(scope, never.wait, lambda message: never.wait()))
    await asyncio.sleep(0)
    answer = await asyncio.wait_for(call(None, access, "/v1/models", ACME, "GET", acceptor), 10)
    assert answer["status"] == 200
    assert not stuck.done()
    stuck.cancel()


@in_event_loop
async def test_a_list_that_would_wait_for_long_is_refused(tenants, monkeypatch):
    """Else those whose clients have long gone would be made before it, and a server not end."""
    monkeypatch.setattr(tenant_turns, "LONGEST_PAUSE_S", 0.001)
    access = Access(tenants_path=str(tenants))
    app = App()
    pace = access.caller(ACME).account.listing[Endpoint.MODELS]
    await pace.begin()
    asked = call(app, access, "/v1/models", ACME, "GET")
    refused = await asyncio.wait_for(asked, 10)
    assert refused["status"] == 429
    assert dict(refused["headers"])[b"retry-after"] == b"1"
    assert not app.callers
    pace.end(0.0)
    assert (await call(app, access, "/v1/models", ACME, "GET"))["status"] == 200


@in_event_loop
async def test_a_tenants_calls_and_lists_end_where_the_application_fails(tenants):
    write(tenants, {"running": 1, "waiting": 0})
    access = Access(tenants_path=str(tenants))

    async def fail(scope, receive, send):
        await asyncio.sleep(0)
        raise RuntimeError("failed")

    for path, method in 3 * [("/v1/completions", "POST"), ("/v1/models", "GET")]:
        with pytest.raises(RuntimeError, match="failed"):
            await asyncio.wait_for(call(fail, access, path, ACME, method), 20)
    assert access.caller(ACME).account.running == 0


class Client:
    """Sends its body in parts, and may go."""

    def __init__(self, *messages):
        self.messages = asyncio.Queue()
        for message in messages:
            self.messages.put_nowait(message)

    async def __call__(self):
        return await self.messages.get()


BODY = [
    {"type": "http.request", "body": b"one", "more_body": True},
    {"type": "http.request", "body": b"two", "more_body": False},
]
GONE = {"type": "http.disconnect"}


async def settled():
    for _ in range(10):
        await asyncio.sleep(0)


def limited(**limits):
    return Account(Tenant("acme", limits=TenantLimits(**limits)))


@in_event_loop
async def test_a_call_that_has_waited_gets_its_whole_body():
    account, client = limited(running=1), Client(*BODY)
    account.begin()
    got = []

    async def call():
        receive = await turn_of(account, client)
        got.extend([await receive(), await receive(), await receive()])
        account.end()

    waiting = asyncio.create_task(call())
    await settled()
    assert (account.waiting, got) == (1, [])
    account.end()
    await settled()
    client.messages.put_nowait(GONE)
    await waiting
    assert got == [*BODY, GONE]
    assert (account.running, account.waiting) == (0, 0)


@pytest.mark.parametrize("way", ["client-goes", "cancelled", "cancelled-with-a-long-body"])
@in_event_loop
async def test_a_call_that_goes_while_it_waits_leaves_no_trace(way):
    account, client = limited(running=1), Client()
    account.begin()

    async def call():
        await turn_of(account, client)
        raise AssertionError("it had its turn")

    waiting = asyncio.create_task(call())
    if way == "cancelled-with-a-long-body":
        long = {"type": "http.request", "body": b"x" * (1 << 20), "more_body": True}
        client.messages.put_nowait(long)
        client.messages.put_nowait(long)
    await settled()
    assert account.waiting == 1
    assert client.messages.qsize() == (way == "cancelled-with-a-long-body")  # a MiB is held
    if way == "client-goes":
        client.messages.put_nowait(GONE)
    else:
        waiting.cancel()
    await asyncio.wait({waiting})
    assert account.waiting == 0
    next_one = account.begin()
    account.end()
    assert next_one.done()
    account.end()
    assert (account.running, account.waiting) == (0, 0)


@in_event_loop
async def test_a_middleware_of_the_operators_has_an_answer_of_every_call(tenants):
    """Includes a call whose client goes while it waits for its turn."""
    write(tenants, {"running": 1})
    statuses = []

    async def note(request, call_next):
        answer = await call_next(request)
        statuses.append(answer.status_code)
        return answer

    async def send(message):
        pass

    access = Access(tenants_path=str(tenants))
    access.caller(ACME).account.begin()
    acceptor = BaseHTTPMiddleware(AccessMiddleware(App(), access), note)
    headers = [(b"authorization", f"Bearer {ACME}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    async with asyncio.timeout(10):
        await acceptor(scope, Client(GONE), send)
    assert statuses == [499]


@pytest.mark.parametrize("way", ["client-goes", "cancelled"])
@in_event_loop
async def test_a_call_that_goes_as_its_turn_comes_passes_it_on(way):
    account, client = limited(running=1), Client()
    account.begin()

    async def call():
        await turn_of(account, client)
        try:
            await asyncio.Event().wait()
        finally:
            account.end()

    going = asyncio.create_task(call())
    await settled()
    after = account.begin()
    account.end()
    if way == "client-goes":
        client.messages.put_nowait(GONE)
        await settled()
    going.cancel()
    await asyncio.wait({going})
    assert after.done()
    account.end()
    assert (account.running, account.waiting) == (0, 0)


@pytest.mark.parametrize("is_metered", [True, False], ids=["ours", "vllm loads the adapters"])
@in_event_loop
async def test_calls_that_wait_end_with_the_server(tenants, is_metered):
    """It ends when all calls have, and without tokens, say, these would wait for minutes."""
    write(tenants, {"running": 1})
    access = access_for(arguments(tenants=str(tenants)))
    processor = SimpleNamespace(request_states={}, propagate_error=lambda error: None)
    if is_metered:
        METER.set(processor, ServerMeter(None))
    account = access.caller(ACME).account
    account.begin()
    waiting = asyncio.create_task(call(App(), access, "/v1/completions", ACME))
    await settled()
    assert account.waiting == 1
    handler = asyncio.create_task(asyncio.Event().wait())
    config = SimpleNamespace(shutdown_timeout=60)
    engine = SimpleNamespace(output_processor=processor, output_handler=handler, vllm_config=config)
    end_all_at_shutdown(engine)
    handler.cancel()
    assert (await asyncio.wait_for(waiting, 10))["status"] == 503
    assert (await call(App(), access, "/v1/completions", ACME))["status"] == 503
    assert (account.running, account.waiting) == (1, 0)


async def until(is_so):
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.01)


@in_event_loop
async def test_a_file_that_has_changed_is_in_force_after_a_moment(tenants, monkeypatch):
    monkeypatch.setattr(access_module, "REFRESH_S", 0.01)
    access = Access(admin_keys=[ADMIN], tenants_path=str(tenants))
    access.watch()
    account = access.caller(ACME).account
    account.begin()
    write(tenants, {"running": 7}, late={"keys": [stored("sk-late")]})
    await until(lambda: access.caller("sk-late").role is Role.TENANT)
    assert access.caller(ACME).account is account
    assert account.tenant.limits.running == 7
    idle = access.caller("sk-late").account
    tenants.write_text('{"tenants": {}}')
    await until(lambda: access.caller(ACME).role is Role.STRANGER)
    assert not access.tenants_now()
    write(tenants, {"running": 7})
    await until(lambda: access.caller(ACME).role is Role.TENANT)
    assert access.caller(ACME).account is account  # what it uses still counts
    write(tenants, {"running": 7}, late={"keys": [stored("sk-late")]})
    await until(lambda: access.caller("sk-late").role is Role.TENANT)
    assert access.caller("sk-late").account is not idle


@in_event_loop
async def test_tenants_that_are_read_again_are_not_compared_at_every_look(
    tenants, monkeypatch, caplog
):
    """Comparing a large file would take the event loop some time, every second."""
    monkeypatch.setattr(access_module, "REFRESH_S", 0.01)
    caplog.set_level("INFO", "vllm_multilora.documents.watched")
    access, compared, equals = Access(tenants_path=str(tenants)), [], Tenants.__eq__

    def compare(one, other):
        compared.append(one)
        return equals(one, other)

    monkeypatch.setattr(Tenants, "__eq__", compare)
    access.watch()
    tenants.write_text(tenants.read_text() + "\n")
    await until(lambda: "Read the tenants" in caplog.text)
    tenants.write_text('{"tenants": {}}')
    await until(lambda: access.caller(ACME).role is Role.STRANGER)
    assert not compared


@in_event_loop
async def test_an_operators_key_is_replaced_in_a_server_that_runs(
    tenants, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(access_module, "REFRESH_S", 0.01)
    path, new = tmp_path / "admin", "sk-admin-9876543210"
    path.write_text(f"{ADMIN}\n")
    write(tenants, {}, long={"keys": [stored("sk-a-tenants-own-key")]})
    access = Access(api_keys=[CLIENT], admin_path=str(path), tenants_path=str(tenants))
    access.watch()
    path.write_text(f"{new}\n{ADMIN}\n")
    await until(lambda: access.caller(new).role is Role.OPERATOR)
    assert access.caller(ADMIN).role is Role.OPERATOR
    path.write_text(f"{new}\n")
    await until(lambda: access.caller(ADMIN).role is Role.STRANGER)
    for wrong in ("", "short", "sk-a-tenants-own-key"):
        caplog.clear()
        path.write_text(wrong)
        await until(lambda: "The admin keys stay as they were" in caplog.text)
        assert not wrong or wrong not in caplog.text
    path.unlink()
    await until(lambda: "No such file" in caplog.text)
    assert access.caller(new).role is Role.OPERATOR
    assert access.caller(CLIENT).role is Role.CLIENT


@in_event_loop
async def test_a_key_that_is_taken_away_is_wrong_without_a_request_in_between(tenants, monkeypatch):
    """A server is told of its start as of a request, and looks at the file from then on."""
    monkeypatch.setattr(access_module, "REFRESH_S", 0.01)
    acceptor = AccessMiddleware(App(), Access(admin_keys=[ADMIN], tenants_path=str(tenants)))
    await acceptor({"type": "lifespan"}, None, AsyncMock())
    tenants.write_text('{"tenants": {}}')
    await until(lambda: not acceptor._access._file.value.by_name)
    await asyncio.sleep(0)
    assert (await call(None, None, "/v1/models", ACME, "GET", acceptor))["status"] == 401


@in_event_loop
async def test_a_key_is_taken_away_though_no_thread_could_be_started_for_a_while(
    tenants, monkeypatch, caplog
):
    """Python has queued by then what the thread was to do, and another one does it."""
    monkeypatch.setattr(access_module, "REFRESH_S", 0.01)
    failing, start = [RuntimeError("can't start new thread")], threading.Thread.start

    def start_thread(thread):
        if failing:
            raise failing.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_thread)
    access = Access(tenants_path=str(tenants))
    tenants.write_text('{"tenants": {}}')
    access.watch()
    await until(lambda: access.caller(ACME).role is Role.STRANGER)
    assert caplog.text.count("stay as they were") == 1


def test_a_key_is_taken_away_while_all_of_asyncios_own_threads_are_busy(tenants, monkeypatch):
    """They check tenants' schemas, for one, and look up the hosts of images."""
    monkeypatch.setattr(access_module, "REFRESH_S", 0.01)
    access, held = Access(tenants_path=str(tenants)), threading.Event()

    async def check():
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, held.wait, 60)
        access.watch()
        tenants.write_text('{"tenants": {}}')
        try:
            await until(lambda: access.caller(ACME).role is Role.STRANGER)
        finally:
            held.set()
            await busy

    asyncio.run(check())


def test_a_tenants_key_is_nobody_elses(tenants):
    with pytest.raises(
        DocumentError, match="'acme' that is also the server's admin key or API key"
    ):
        Access(admin_keys=[ACME], tenants_path=str(tenants))


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({}, None),
        ({"Authorization": "Bearer k"}, "k"),
        ({"Authorization": "bearer k"}, "k"),
        ({"Authorization": "Basic k"}, None),
        ({"Authorization": "Bearer"}, None),
        ({"x-api-key": "k"}, "k"),
        ({"Authorization": "Bearer a", "x-api-key": "b"}, "a"),
    ],
)
def test_a_key_is_a_bearer_token_or_anthropics_header(headers, key):
    assert presented_key(Headers(headers)) == key


def test_admin_keys_come_from_a_file_or_the_environment(tmp_path):
    path = tmp_path / "keys"
    # As some editors begin a file, and with a key of several words.
    path.write_text(f"\ufeff{ADMIN}\r\n\n {ADMIN} {ADMIN} \n")
    from_file = MultiLoRAConfig(admin_key_file=str(path))
    assert read_admin_keys(from_file, {}) == [ADMIN, f"{ADMIN} {ADMIN}"]
    assert read_admin_keys(MultiLoRAConfig(), {"MULTILORA_ADMIN_KEY": ADMIN}) == [ADMIN]
    assert read_admin_keys(MultiLoRAConfig(), {}) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("\n", "found no admin key"),
        ("short", "fewer than 16"),
        (f"{ADMIN}\nshort", "fewer than 16"),
        (f"{ADMIN}-ü", "HTTP cannot carry"),
        (f"{ADMIN}\n{ADMIN}-ü", "HTTP cannot carry"),
        (ADMIN * 50, "HTTP cannot carry"),
        (f"{ADMIN}\n{stored(ADMIN)}\n", "found a key's hash, expected keys alone"),
    ],
)
def test_an_admin_key_file_without_a_good_key_is_refused(tmp_path, content, message):
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_admin_keys(MultiLoRAConfig(admin_key_file=str(path)), {})


def arguments(**settings):
    return Namespace(enable_lora=True, api_key=None, additional_config={"multilora": settings})


def test_api_servers_of_one_server_have_the_same_salt_and_share_limits(tenants, monkeypatch):
    write(tenants, {"running": 8})
    monkeypatch.setenv("MULTILORA_CACHE_SALT", "shared")
    monkeypatch.setenv("MULTILORA_API_SERVERS", "2")
    one, two = (access_for(arguments(tenants=str(tenants))) for _ in range(2))
    assert one.caller(ACME).secret == two.caller(ACME).secret == "shared"
    assert one.caller(ACME).account._limits.running == 4


def test_a_salt_in_the_file_counts_for_all_replicas(tenants):
    salt = "s" * 32
    data = json.loads(tenants.read_text())
    tenants.write_text(json.dumps({**data, "cache_salt": salt}))
    access = Access(tenants_path=str(tenants), secret="the server's own")
    assert access.caller(ACME).secret == salt


def engine(tenants, *, lora=True):
    parallel = SimpleNamespace(
        _api_process_rank=-1, _api_process_count=3, data_parallel_backend="mp"
    )
    return SimpleNamespace(
        additional_config={"multilora": {"tenants": str(tenants)}},
        lora_config=SimpleNamespace() if lora else None,
        parallel_config=parallel,
        structured_outputs_config=StructuredOutputsConfig(),
    )


@pytest.mark.parametrize(
    ("way", "error", "message"),
    [
        ("no-lora", ConfigError, "protect nothing here"),
        ("ray", ConfigError, "--data-parallel-backend mp"),
        ("rust", ConfigError, "Python front end"),
        ("no-tenants", DocumentError, "expected tenants by name"),
        ("open-port", ConfigError, "status-port 0.0.0.0:9400 would show whoever reaches 0.0.0.0"),
    ],
)
def test_a_server_that_cannot_guard_its_tenants_does_not_start(
    tenants, monkeypatch, way, error, message
):
    config = engine(tenants, lora=way != "no-lora")
    if way == "ray":
        config.parallel_config.data_parallel_backend = "ray"
    elif way == "rust":
        monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    elif way == "no-tenants":
        tenants.write_text('{"tenants": 7}')
    elif way == "open-port":
        config.additional_config["multilora"]["status_port"] = "0.0.0.0:9400"
    with pytest.raises(error, match=message):
        check_access(config, UsageContext.OPENAI_API_SERVER)


@pytest.mark.parametrize("usage", [UsageContext.OPENAI_BATCH_RUNNER, UsageContext.LLM_CLASS])
def test_where_no_requests_come_over_http_it_is_said_that_keys_have_no_effect(
    tenants, caplog, usage
):
    check_access(engine(tenants), usage)
    assert "no effect" in caplog.text


def test_a_server_without_an_engine_that_would_guard_nothing_does_not_start(tenants):
    """`vllm launch render`, whose engine's configuration nobody has to check."""
    args = arguments(tenants=str(tenants))
    args.enable_lora = False
    args.middleware = ["an.operators.own"]
    with pytest.raises(ConfigError, match="protect nothing here"):
        mount_gateway(args)
    args.additional_config = None
    mount_gateway(args)
    assert args.middleware == ["an.operators.own"]


def test_an_admin_key_of_the_environment_is_read_before_the_model_and_never_ignored(
    tenants, monkeypatch
):
    def check(usage=UsageContext.OPENAI_API_SERVER, lora=True, **settings):
        config = engine(tenants, lora=lora)
        config.additional_config = {"multilora": settings}
        check_access(config, usage)

    monkeypatch.setenv("MULTILORA_ADMIN_KEY", "short")
    with pytest.raises(ConfigError, match="MULTILORA_ADMIN_KEY: found an admin key of fewer"):
        check()
    monkeypatch.setenv("MULTILORA_ADMIN_KEY", ADMIN)
    check()
    with pytest.raises(ConfigError, match="MULTILORA_ADMIN_KEY protect nothing here"):
        check(enabled=False)
    check(enabled=False, lora=False)  # it has no adapters to load
    check(UsageContext.LLM_CLASS, enabled=False)


def test_server_with_keys_and_without_the_gateway_answers_nobody(tenants, monkeypatch):
    """Whatever has made its application from other arguments than vLLM's."""
    sent = []
    answers = SimpleNamespace(request_outputs=[], reqs_to_abort=[])
    processor = SimpleNamespace(request_states={}, tokenizer=None)

    def answer():
        process_outputs(lambda *_: sent.append(1) or answers, processor, [])

    checks = []
    for module in (failure_delivery, start_checks):
        monkeypatch.setattr(module, "ANSWER_CHECKS", checks)
    monkeypatch.delitem(sys.modules, "vllm_multilora.gateway.app", raising=False)
    answer()
    check_access(engine(tenants), UsageContext.OPENAI_API_SERVER)
    with pytest.raises(GracefulHTTPError, match="lacks what enforces them, the middleware vllm_"):
        answer()
    importlib.import_module("vllm_multilora.gateway.app")  # as vLLM imports middlewares
    answer()
    assert len(sent) == 2


def test_what_api_servers_share_is_made_before_they_start(tenants, monkeypatch):
    for name in ("MULTILORA_CACHE_SALT", "MULTILORA_API_SERVERS"):
        monkeypatch.setenv(name, "")
    made = set()
    for _ in range(2):
        check_access(engine(tenants), UsageContext.OPENAI_API_SERVER)
        assert os.environ["MULTILORA_API_SERVERS"] == "3"
        made.add(os.environ["MULTILORA_CACHE_SALT"])
    assert len(made) == 2
    assert min(map(len, made)) == 64


def test_secret_of_engines_on_other_machines_is_the_salt_of_the_file(tenants, monkeypatch):
    for name in ("MULTILORA_CACHE_SALT", "MULTILORA_API_SERVERS"):
        monkeypatch.setenv(name, "")
    with pytest.raises(ConfigError, match="a secret that their API servers share"):
        check_access(engine(tenants), UsageContext.OPENAI_API_SERVER, is_headless=True)
    tenants.write_text(json.dumps({**json.loads(tenants.read_text()), "cache_salt": "s" * 32}))
    check_access(engine(tenants), UsageContext.OPENAI_API_SERVER, is_headless=True)
    assert os.environ["MULTILORA_CACHE_SALT"] == "s" * 32


def test_a_store_is_started_without_the_keys_of_servers(monkeypatch):
    """Its jobs inherit what it has, and may be made to say it by the files that they read."""
    for name in (ADMIN_KEY_VARIABLE, SECRET_VARIABLE, "VLLM_API_KEY"):
        monkeypatch.setenv(name, "secret-0123456789")
    assert "secret-0123456789" not in environment().values()


def test_folders_and_what_lies_below_are_not_named():
    text = "found /srv/adapters/acme/x.json, expected a path below /srv/adapters or /data"
    folders = ("/srv", "/srv/adapters/", "/data", "")
    shown = "found <path>/acme/x.json, expected a path below <path> or <path>"
    assert without_folders(text, folders) == shown
    assert without_folders(text, ()) == text


def test_folders_are_hidden_by_all_names_that_messages_give_them(tenants, tmp_path, monkeypatch):
    """However the operator has written them: the store resolves links, and has another folder."""
    (tmp_path / "disk-7").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "disk-7")
    monkeypatch.chdir(tmp_path)
    access = access_for(
        arguments(tenants=str(tenants), adapter_dir=["linked"], allowed_roots=["adapters"])
    )
    text = f"two adapters: {tmp_path}/disk-7/x, {tmp_path}/linked, {tmp_path}/adapters"
    assert access.caller(ACME).shown(text) == "two adapters: <path>/x, <path>, <path>"
