"""The server that clients ask, and a note of which client each test has tried."""

from collections.abc import Callable, Iterator
from importlib.metadata import version

import pytest

from tests.clients.programs import HASTY, Program
from tests.clients.record import Recorder
from tests.clients.site import Site, running_open_site, running_site
from tests.serving.conftest import llama
from tests.serving.models.cases import Scenario

__all__ = ["llama"]

_RECORDER = Recorder()


def pytest_itemcollected(item: pytest.Item) -> None:
    for mark in item.iter_markers("proves"):
        item.user_properties.append(("proves", mark.args[0]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _RECORDER.hear(report)


def pytest_sessionfinish() -> None:
    _RECORDER.write(version("vllm"))


@pytest.fixture(scope="package")
def site(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(llama, tmp_path_factory.mktemp("site"), HASTY) as running:
        yield running


@pytest.fixture(scope="package")
def open_site(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_open_site(llama, tmp_path_factory.mktemp("open")) as running:
        yield running


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """Notes a client and its version, for the table in the docs."""

    def note(name: str, version: str) -> None:
        record_property("client", name)
        record_property("version", version)

    return note


@pytest.fixture
def client(request: pytest.FixtureRequest, tried: Callable[[str, str], None]) -> Program:
    """The client of a test that is parametrised with it."""
    program: Program = request.param
    tried(program.name, program.version)
    return program
