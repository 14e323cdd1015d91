"""Requests without a valid key fill no log."""

import asyncio
import logging

import pytest

pytest.importorskip("vllm")

import uvicorn
import uvloop

from vllm_multilora.gateway.keys.access import Access
from vllm_multilora.gateway.keys.access_log import (
    MOST_LINES,
    PERIOD_S,
    FewRefusals,
    NoGoneClients,
    keep_refusals_few,
)
from vllm_multilora.gateway.keys.middleware import AccessMiddleware
from vllm_multilora.gateway.limits import pauses


def line(status: int) -> logging.LogRecord:
    """As uvicorn's."""
    args = ("127.0.0.1:1", "GET", "/v1/models", "1.1", status)
    return logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "%s %s %s %s %d", args, None)


def test_few_refusals_are_logged_and_the_others_counted(caplog):
    now = 100.0
    few = FewRefusals(lambda: now)
    assert sum(few.filter(line(401)) for _ in range(1000)) == MOST_LINES
    assert all(few.filter(line(status)) for status in (200, 403, 404, 500) for _ in range(100))
    now += PERIOD_S
    with caplog.at_level(logging.WARNING):
        assert sum(few.filter(line(401)) for _ in range(5)) == 5
        now += PERIOD_S
        assert sum(few.filter(line(401)) for _ in range(MOST_LINES + 1)) == MOST_LINES
        now += PERIOD_S
        assert few.filter(line(401))
    assert [record.getMessage() for record in caplog.records] == [
        f"{1000 - MOST_LINES} more requests without a valid key came in the time before.",
        "1 more request without a valid key came in the time before.",
    ]


def test_lines_of_another_form_pass():
    few = FewRefusals()
    for args in (None, (), ({"a": 1},)):
        record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "hello", args, None)
        assert few.filter(record)


@pytest.fixture
def loggers():
    """Uvicorn's, as they were afterwards."""
    found = [logging.getLogger(name) for name in ("uvicorn.access", "uvicorn.error")]
    before = [list(logger.filters) for logger in found]
    yield found
    for logger, filters in zip(found, before, strict=True):
        logger.filters[:] = filters


def test_uvicorns_loggers_have_one_filter_however_often_it_is_asked_for(loggers):
    for logger in loggers:
        logger.filters.clear()
    keep_refusals_few()
    keep_refusals_few()
    assert [[type(known) for known in logger.filters] for logger in loggers] == [
        [FewRefusals],
        [NoGoneClients],
    ]


def test_a_client_that_has_gone_before_its_answers_is_no_traceback(loggers, monkeypatch):
    """The client has more requests in line, for which uvicorn still writes to it."""
    monkeypatch.setattr(pauses, "LONGEST_PAUSE_S", 0.2)
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append
    loggers[1].addHandler(handler)
    call = b"POST /adapters HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n"

    async def app(scope, receive, send):
        raise RuntimeError("a fault of the server's own")

    async def go_away():
        door = AccessMiddleware(app, Access(admin_keys=["sk-admin-0123456789"]), 1)
        door._strangers.charge(1_000)
        settings = {"lifespan": "off", "log_config": None, "http": "httptools"}
        server = uvicorn.Server(uvicorn.Config(door, host="127.0.0.1", port=0, **settings))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        place = server.servers[0].sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(*place)
        writer.write(call * 50)
        assert b" 401 " in await asyncio.wait_for(reader.readline(), 30)
        writer.transport.abort()
        reader, writer = await asyncio.open_connection(*place)
        writer.write(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        assert b" 500 " in await asyncio.wait_for(reader.readline(), 30)
        writer.close()
        server.should_exit = True  # it waits for all requests
        await asyncio.wait_for(serving, 30)

    try:
        uvloop.run(go_away())
    finally:
        loggers[1].removeHandler(handler)
    faults = [str(record.exc_info[1]) for record in said if record.exc_info]
    assert faults == ["a fault of the server's own"]
