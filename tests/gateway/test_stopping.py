"""A server that is told to stop says so, and whoever heard the signal before hears it still."""

import asyncio
import os
import signal

import pytest

pytest.importorskip("vllm")

from fastapi.testclient import TestClient

from vllm_multilora.gateway.stopping import STOP, listen

from .test_app import application, arguments


@pytest.fixture
def kept_handlers(monkeypatch):
    monkeypatch.setattr(STOP, "has_come", False)
    monkeypatch.setattr(STOP, "act", lambda: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("kept_handlers")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_signal_is_heard_beside_the_event_loops_handler(loop, number):
    async def serve():
        heard = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(number, heard.set)
        listen()
        assert not STOP.has_come
        os.kill(os.getpid(), number)
        await asyncio.wait_for(heard.wait(), 10)

    run = asyncio.run if loop == "asyncio" else pytest.importorskip("uvloop").run
    run(serve())
    assert STOP.has_come


@pytest.mark.usefixtures("kept_handlers")
def test_signal_that_ends_the_process_is_left_alone():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    listen()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", "/health", 503), ("GET", "/ping", 503), ("GET", "/version", 200)),
        *(("POST", "/v1/completions", 503), ("POST", "/v1/messages", 503)),
    ],
)
def test_stopping_server_is_not_healthy_and_takes_no_calls(monkeypatch, method, path, status):
    client = TestClient(application(arguments("--enable-lora")))
    monkeypatch.setattr(STOP, "has_come", True)
    answer = client.request(method, path, json={} if method == "POST" else None)
    assert answer.status_code == status
    if status == 503:
        assert "being stopped" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "2"
