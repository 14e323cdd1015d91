"""Workers on other machines reach their engine core over TCP, and nobody else does."""

import contextlib
import socket
import threading
import time

import pytest
from vllm.config import VllmConfig

from tests.store.fake_reader import FakeReader
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.engine.workers import reaching
from vllm_multilora.integration.engine.workers.reaching import RemoteStore
from vllm_multilora.integration.worker_link import remote_link
from vllm_multilora.integration.worker_link.fill_link import (
    Filled,
    FillFailed,
    FillLink,
    WorkerLink,
)
from vllm_multilora.integration.worker_link.remote_link import (
    LinkAddress,
    RemoteAcceptor,
    StoreRelay,
    dial,
)
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.messages import Loaded, LoadRequest, Restarted, StoreSettings
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE, StoreUnavailableError
from vllm_multilora.store.store_launch import StoreThread

PATIENT_S = 20.0


@pytest.fixture
def acceptor():
    acceptor = RemoteAcceptor("127.0.0.1")
    yield acceptor
    acceptor.close()


def take(acceptor: RemoteAcceptor, purpose, rank: int) -> socket.socket:
    deadline = time.monotonic() + PATIENT_S
    while (connection := acceptor.take(purpose, rank)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return connection


def is_hung_up(connection: socket.socket) -> bool:
    connection.settimeout(PATIENT_S)
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def test_a_worker_is_let_in_as_what_it_says_it_is(acceptor):
    assert acceptor.take("fills", 3) is None
    with dial(acceptor.address, "fills", 3), take(acceptor, "fills", 3):
        assert acceptor.take("fills", 3) is None
        assert acceptor.take("store", 3) is None


def test_the_newest_connection_counts(acceptor):
    with dial(acceptor.address, "store", 1) as old, dial(acceptor.address, "store", 1) as new:
        deadline = time.monotonic() + PATIENT_S
        with take(acceptor, "store", 1) as first:
            first.sendall(b"?")
            second = None
            while second is None and first.getpeername() != new.getsockname():
                assert time.monotonic() < deadline
                second = acceptor.take("store", 1)
            if second is None:
                assert is_hung_up(old)
            else:
                second.close()


@pytest.mark.parametrize("key", [b"", b"\0" * 32, b"another key"])
def test_nobody_without_the_key_is_let_in(acceptor, key):
    wrong = LinkAddress(acceptor.address.host, acceptor.address.port, key)
    with dial(wrong, "fills", 0) as stranger:
        deadline = time.monotonic() + PATIENT_S
        stranger.setblocking(False)
        while True:
            assert acceptor.take("fills", 0) is None
            with contextlib.suppress(BlockingIOError):
                assert stranger.recv(1) == b""
                break
            assert time.monotonic() < deadline


def test_those_who_say_nothing_or_nonsense_keep_nobody_out(acceptor):
    address = (acceptor.address.host, acceptor.address.port)
    silent = [socket.create_connection(address, PATIENT_S) for _ in range(100)]
    silent[0].sendall(b"GET / HTTP/1.1\r\nHost: nobody at all, really\r\n\r\n")
    begin = time.monotonic()
    assert acceptor.take("fills", 0) is None
    assert time.monotonic() - begin < 2.0, "nobody may keep the engine waiting"
    with dial(acceptor.address, "fills", 0):
        take(acceptor, "fills", 0).close()
    assert is_hung_up(silent[0])
    for connection in silent:
        connection.close()


def test_answers_arrive_over_tcp(acceptor):
    link = FillLink(1)
    try:
        assert link.attach_all() == [0]
        worker = WorkerLink(dial(acceptor.address, "fills", 0))
        link.adopt(0, take(acceptor, "fills", 0))
        said = [Filled(1, 0.5), FillFailed(2, FailureKind.NO_MEMORY, "no room")]
        for answer in said:
            worker.tell(answer)
        found: list = []
        deadline = time.monotonic() + PATIENT_S
        while len(found) < 2:
            assert time.monotonic() < deadline
            found += link.poll()
        assert found == [(0, answer) for answer in said]
    finally:
        link.close()


class Ending(StoreThread):
    """A store whose connections the test can cut, as its death would."""

    def __init__(self) -> None:
        super().__init__(FakeReader())
        self.made: list[socket.socket] = []

    def connect(self) -> socket.socket:
        self.made.append(super().connect())
        return self.made[-1]


@pytest.fixture
def relayed(acceptor, tmp_path, monkeypatch):
    """An engine core's client of a store that a relay brings to it, and that store."""
    monkeypatch.setattr(remote_link, "LONGEST_PAUSE_S", 0.1)
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    store = Ending()
    StoreRelay(store, lambda: dial(acceptor.address, "store", 2))
    host = RemoteStore(acceptor, 2, f"unix:{store.path}", take(acceptor, "store", 2))
    client = StoreClient(host, "server")
    client.configure([1], StoreSettings())
    yield client, store
    client.close()


def until(client: StoreClient, kind: type):
    deadline = time.monotonic() + PATIENT_S
    while True:
        assert time.monotonic() < deadline
        for message in client.poll(0.5):
            if isinstance(message, kind):
                return message


def test_a_store_is_used_through_its_relay(relayed):
    client, store = relayed
    assert client.address == f"unix:{store.path}"
    for number in range(1, 4):
        ticket = client.request_load(LoadRequest(number, "a", f"/fake/{number}?blocks=64,128"))
        assert until(client, Loaded).ticket == ticket


def test_a_relay_does_not_mind_silence(relayed):
    _, store = relayed
    assert store.made[-1].gettimeout() is None


def test_a_store_that_has_gone_comes_back_through_its_relay(relayed):
    client, store = relayed
    client.request_load(LoadRequest(1, "a", "/fake/1"))
    assert until(client, Loaded).was_read
    store.made[-1].shutdown(socket.SHUT_RDWR)
    until(client, Restarted)
    ticket = client.request_load(LoadRequest(1, "a", "/fake/1"))
    assert until(client, Loaded).ticket == ticket


def test_a_relay_goes_on_after_a_thread_could_not_be_started(relayed, monkeypatch):
    client, store = relayed
    start, failing = threading.Thread.start, [RuntimeError("can't start new thread")]

    def start_or_fail(thread):
        if failing:
            raise failing.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    store.made[-1].shutdown(socket.SHUT_RDWR)
    ticket = client.request_load(LoadRequest(1, "a", "/fake/1"))
    assert until(client, Loaded).ticket == ticket
    assert not failing


def test_a_relay_whose_engine_core_has_gone_leaves_its_store(relayed, acceptor):
    client, store = relayed
    client.close()
    acceptor.close()
    deadline = time.monotonic() + PATIENT_S
    while store.made[-1].fileno() != -1:
        assert time.monotonic() < deadline, "the relay keeps its store"
        time.sleep(0.01)


def test_without_an_engine_core_there_is_no_relay(tmp_path):
    def dial_nobody() -> socket.socket:
        raise ConnectionRefusedError(111, "Connection refused")

    before = threading.active_count()
    with pytest.raises(OSError, match="refused"):
        StoreRelay(Ending(), dial_nobody)
    assert threading.active_count() == before


def test_a_store_that_no_worker_has_brought_is_not_there(acceptor):
    here, there = socket.socketpair()
    host = RemoteStore(acceptor, 0, "unix:/run/store.sock", here)
    assert host.connect() is here
    with pytest.raises(StoreUnavailableError, match="worker 0"):
        host.connect()
    here.close()
    there.close()


def test_where_a_worker_does_not_come_the_engine_waits_for_its_workers(monkeypatch):
    monkeypatch.setattr(reaching, "get_ip", lambda: "127.0.0.1")
    asked: list = []

    class Executor:
        def collective_rpc(self, method, args=()):
            asked.append(args[0])
            return [None, None]

    link = FillLink(2)
    try:
        assert reaching.reach(Executor(), link, [1], VllmConfig()) is None
        (address,) = asked
        with pytest.raises(ConnectionRefusedError):
            dial(address, "fills", 1)
    finally:
        link.close()
