"""An engine core's side of the connection, against a store that the test plays."""

import itertools
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from vllm_multilora.failures import FailureKind
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.channel import Channel
from vllm_multilora.store.protocol.messages import (
    Cancel,
    Configured,
    Failed,
    FromClient,
    Loaded,
    LoadRequest,
    PackInfo,
    Reading,
    Refused,
    Release,
    Restarted,
    Share,
    StoreSettings,
    Totals,
)
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.store.store_launch import FIRST_PAUSE_S, LONGEST_PAUSE_S

STEP_S = FIRST_PAUSE_S / 10
"""Between two looks at a clock."""


class Stores:
    """Where a client's stores are: each connection leads to another one."""

    path = Path("/nowhere")

    def __init__(self) -> None:
        self.newest: Channel | None = None
        self.is_down = False

    def connect(self) -> socket.socket:
        if self.is_down:
            raise StoreUnavailableError("no process can be started")
        here, there = socket.socketpair()
        there.setblocking(False)
        self.newest = Channel(there, FromClient)
        return here

    def last_words(self) -> str:
        return "there is no memory"

    def say(self, *messages) -> None:
        for message in messages:
            self.newest.send(message)

    def heard(self) -> list:
        """What the newest store has been told, but for greetings."""
        return [message for message, _ in self.newest.receive()][1:]


@pytest.fixture
def stores() -> Stores:
    return Stores()


@pytest.fixture
def client(stores):
    client = StoreClient(stores, "server")
    yield client
    client.close()


def loaded(ticket: int, pack: int) -> Loaded:
    info = PackInfo(8, False, (), False, pack, 1, "digest", [1], 0, 64, ())
    return Loaded(ticket, info, 0.0, False, True)


def request_load(client: StoreClient, adapter: int) -> int:
    return client.request_load(LoadRequest(adapter, "acme", f"/adapters/{adapter}"))


@pytest.mark.parametrize("leased", [True, False])
def test_the_lease_of_an_answer_that_comes_too_late_is_given_back(client, stores, leased):
    """Where it has none, no other load request loses its own."""
    ticket = client.request_load(LoadRequest(1, "acme", "/adapters/1", keep=leased))
    client.cancel(ticket)
    answer = msgspec.structs.replace(loaded(ticket, pack=11), leased=leased)
    stores.say(Reading(ticket), answer)
    assert client.poll() == []
    assert stores.heard()[1:] == [Cancel(ticket)] + [Release(11)] * leased


def test_what_was_answered_is_not_asked_of_the_next_store(client, stores):
    stores.say(loaded(request_load(client, 1), pack=11))
    client.poll()
    stores.newest.close()
    client.poll()
    assert stores.heard() == []


def test_a_load_request_taken_back_before_its_failure_is_taken_is_not_answered(client):
    client.cancel(client.request_load(LoadRequest(1 << 63, "acme", "/adapters/1")))
    assert client.poll() == []


@pytest.mark.parametrize("answer", [loaded(2, pack=22), Failed(2, FailureKind.TIMEOUT, "", [])])
def test_the_last_words_of_a_store_that_dies_meanwhile_count_for_nothing(client, stores, answer):
    """It is noticed when the first answer's lease is given back."""
    client.cancel(request_load(client, 1))
    request_load(client, 2)
    stores.say(loaded(1, pack=11), answer)
    stores.newest.receive()
    stores.newest.close()
    assert client.poll() == [Restarted()]
    client.poll()
    assert [message.adapter for message in stores.heard()] == [2]
    stores.say(loaded(2, pack=33))
    assert client.poll() == [loaded(2, pack=33)]


def test_a_load_request_can_be_taken_back_while_its_store_dies(client, stores):
    """Its answer was heard, and not taken yet."""
    ticket = request_load(client, 1)
    stores.say(loaded(ticket, pack=11))
    client._pump(0)
    stores.newest.close()
    client.cancel(ticket)
    assert client.poll() == [Restarted()]
    assert stores.heard() == []


def test_what_the_next_store_keeps_otherwise_than_asked_for_is_logged(client, stores, caplog):
    """It was configured by another server's engine first."""
    stores.say(Configured([]))
    assert client.configure([1], StoreSettings()) == []
    stores.newest.close()
    client.poll()
    client.poll()
    stores.say(Configured(["the cache policy is 'lru'"]))
    client.poll()
    assert "the cache policy is 'lru'" in caplog.text


@pytest.fixture
def clock(monkeypatch):
    """The clients' time, which goes on when they look at it."""
    now = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: STEP_S * next(now), sleep=lambda seconds: None)
    monkeypatch.setattr("vllm_multilora.store.clients.client.time", clock)
    return clock


@pytest.mark.parametrize("ends", ["before it is up", "when it is up"])
def test_nobody_waits_for_long_for_a_store_that_cannot_be_had(client, stores, clock, ends):
    def wait() -> list:
        found, begun = [], clock.monotonic()
        while not found and clock.monotonic() < begun + 4 * LONGEST_PAUSE_S:
            if ends == "when it is up":
                stores.newest.close()
            found = [message for message in client.poll() if message != Restarted()]
        return found

    ticket = request_load(client, 1)
    stores.is_down = ends == "before it is up"
    stores.newest.close()
    (failed,) = wait()
    assert (failed.ticket, failed.kind) == (ticket, FailureKind.UNREADABLE)
    assert "the server's log says why" in failed.message
    ticket = request_load(client, 2)
    (failed,) = wait()
    assert failed.ticket == ticket
    stores.is_down = False
    request_load(client, 3)
    before = stores.newest
    while stores.newest is before:
        client.poll()
    assert [message.adapter for message in stores.heard()] == [3]


@pytest.mark.parametrize("last_words", [(), (Refused("no descriptor left"),)])
def test_stores_that_do_not_serve_are_tried_ever_less_often_until_one_does(
    client, stores, clock, caplog, last_words
):
    def seconds_to_the_next_store() -> float:
        before, begun = stores.newest, clock.monotonic()
        before.close()
        while stores.newest is before:
            client.poll()
        return clock.monotonic() - begun

    pauses = []
    for _ in range(10):
        stores.say(*last_words)
        pauses.append(seconds_to_the_next_store())
    doubled = [min(FIRST_PAUSE_S * 2**n, LONGEST_PAUSE_S) for n in range(9)]
    assert pauses[1:] == pytest.approx(doubled, abs=5 * STEP_S)
    assert "there is no memory" in caplog.text
    assert ("no descriptor left" in caplog.text) == bool(last_words)
    stores.say(Totals(0, 0, None, None))
    client.poll()
    assert seconds_to_the_next_store() < FIRST_PAUSE_S
    assert seconds_to_the_next_store() == pytest.approx(FIRST_PAUSE_S, abs=5 * STEP_S)


@pytest.mark.parametrize("number", [-1, 1 << 63])
def test_what_no_message_can_hold_fails_at_once_and_is_not_said(client, stores, number):
    ticket = client.request_load(LoadRequest(number, "acme", "/adapters/1"))
    (failed,) = client.poll()
    assert (failed.ticket, failed.kind) == (ticket, FailureKind.INVALID)
    assert f"its number is {number}" in failed.message
    client.share(ticket, "another")
    assert stores.heard() == []


def test_what_no_message_can_hold_fails_though_the_store_dies(client, stores):
    ticket = client.request_load(LoadRequest(-1, "acme", "/adapters/1"))
    stores.newest.close()
    failed, restarted = client.poll()
    assert failed.ticket == ticket
    assert restarted == Restarted()


def test_what_a_socket_cannot_hold_is_said_as_the_store_reads(client, stores):
    ticket = client.request_load(LoadRequest(1, "acme", "/" + "x" * (2 << 20)))
    heard = []
    for _ in range(1000):
        heard += stores.newest.receive()
        if len(heard) == 2:
            break
        client.poll()
    assert heard[1][0].ticket == ticket
    client.poll()
    assert not client._channel.wait(0), "it waits to say more, and never sleeps again"


def test_whose_turns_a_load_request_may_take_is_said_to_the_next_store(client, stores):
    ticket = client.request_load(LoadRequest(1, "acme", "/adapters/1", owners=("one",)))
    for owner in ("two", "one", "two"):
        client.share(ticket, owner)
    assert stores.heard()[1:] == [Share(ticket, "two")]
    stores.newest.close()
    client.poll()
    assert [message.owners for message in stores.heard()] == [("one", "two")]


def test_who_is_woken_by_a_store_is_woken_by_the_next_one(client, stores, monkeypatch):
    watched, rearmed = [], []
    waker = SimpleNamespace(
        watch=watched.append, rearm=lambda: rearmed.append(True), close=lambda: None
    )
    monkeypatch.setattr("vllm_multilora.store.clients.client.Waker", lambda wake: waker)
    client.start_waking(lambda: None)
    first = client.fileno()
    stores.newest.close()
    client.poll()
    assert watched == [first, -1, client.fileno()]
    assert rearmed == [True]


def test_nothing_is_heard_on_the_descriptor_of_a_store_that_has_gone(client, stores):
    """By then it may be anything else's, and always readable."""
    gone, connect, others = client.fileno(), stores.connect, []

    def connect_elsewhere():
        while gone not in others:
            others.append(os.open(os.devnull, os.O_RDONLY))
        return connect()

    stores.connect = connect_elsewhere
    stores.newest.close()
    try:
        client.poll()
        assert client.fileno() not in (gone, -1)
        assert not client._channel.wait(0)
    finally:
        for descriptor in others:
            os.close(descriptor)


def test_an_answer_is_waited_for_when_everything_has_been_said(client, stores):
    later = []
    client.say_by(later.append, lambda: [call() for call in later])
    ticket = request_load(client, 1)
    client.poll()
    assert stores.heard() == []
    client.poll(0.001)
    ((heard, _),) = stores.newest.receive()
    assert heard.ticket == ticket


def test_what_is_to_be_said_later_is_not_said_to_the_next_store(client, stores):
    """It is told what is wanted when it is there, once, and knows no pack of the one before."""
    later = []
    client.say_by(later.append, lambda: None)
    ticket = request_load(client, 1)
    client.release(11)
    assert stores.heard() == []
    stores.newest.close()
    assert client.poll() == [Restarted()]
    client.poll()
    for call in later:
        call()
    heard = stores.heard()
    assert [(message.ticket, message.adapter) for message in heard] == [(ticket, 1)]
    assert client.fileno() >= 0
