"""Stores of the test's own: in processes, in a folder of their own, with adapters of fantasy."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.store.fake_reader import FakeReader
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.messages import (
    Description,
    Failed,
    Loaded,
    LoadRequest,
    StoreSettings,
)
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE
from vllm_multilora.store.store_launch import StoreProcess, StoreThread

FAKE = "tests.store.fake_reader:FakeReader"
PATIENT_S = 20.0


def is_writable(address: int) -> bool:
    """Whether this process may write to memory at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, *_ = line.split()
        begin, end = (int(each, 16) for each in span.split("-"))
        if begin <= address < end:
            return "w" in access
    return False


class Engine:
    """A client with what tests do all the time."""

    def __init__(self, client: StoreClient, layouts=(1,), **settings) -> None:
        self.client = client
        self.seen: list = []
        self.notes = client.configure(layouts, StoreSettings(**settings))

    def until(self, is_enough: Callable[[], bool], seconds: float = PATIENT_S) -> None:
        deadline = time.monotonic() + seconds
        while not is_enough():
            assert time.monotonic() < deadline, f"nothing but {self.seen}"
            self.seen += self.client.poll(0.05)

    def answer(self, ticket: int, seconds: float = PATIENT_S):
        def found():
            return [m for m in self.seen if isinstance(m, Loaded | Failed) and m.ticket == ticket]

        self.until(lambda: bool(found()), seconds)
        (answer,) = found()
        return answer

    def load(self, adapter: int, path: str, **options):
        return self.answer(
            self.client.request_load(LoadRequest(adapter, f"adapter {adapter}", path, **options))
        )

    def describe(self) -> Description:
        self.client.describe()
        self.seen = [m for m in self.seen if not isinstance(m, Description)]
        self.until(lambda: any(isinstance(m, Description) for m in self.seen))
        return next(m for m in self.seen if isinstance(m, Description))

    def store(self) -> psutil.Process:
        return psutil.Process(self.describe().pid)


@pytest.fixture(autouse=True)
def store_folder(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    return folder


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    """Makes engines whose store is a process; it ends a moment after the test."""
    made: list[Engine] = []

    def make(server: str = "server", **settings) -> Engine:
        engine = Engine(StoreClient(StoreProcess(FAKE), server), **settings)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.client.close()


@pytest.fixture
def engine(engines) -> Engine:
    return engines()


@pytest.fixture
def threaded() -> Iterator[Engine]:
    """An engine whose store is a thread."""
    engine = Engine(StoreClient(StoreThread(FakeReader()), "server"))
    yield engine
    engine.client.close()
