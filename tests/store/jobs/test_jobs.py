"""A job packs where the store says."""

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from tests.store.conftest import PATIENT_S
from tests.store.fake_reader import FakeReader, content_of
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.jobs import runner, sandbox
from vllm_multilora.store.jobs.runner import ForkRunner, ThreadRunner, Use
from vllm_multilora.store.memory.arena import PAGE, PLACE_BITS
from vllm_multilora.store.memory.entries import Binding, Load
from vllm_multilora.store.memory.segments import SharedSegments
from vllm_multilora.store.protocol.channel import MAX_DESCRIPTORS, Channel
from vllm_multilora.store.protocol.job_messages import Checked, Done, FromJob, Opened, Place
from vllm_multilora.store.protocol.messages import StoreSettings

pytestmark = pytest.mark.waits

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def segments():
    made = SharedSegments()
    yield made
    made.close_all()


def messages_of(channel):
    while True:
        yield from (message for message, _ in channel.receive())


def start_fake(path: str = "/fake/a", reader: FakeReader | None = None, **settings) -> tuple:
    load = Load(1, Binding("server", None, 1), path, [], [], StoreSettings(**settings))
    return ForkRunner().start(load, reader or FakeReader())


@contextmanager
def started(*what, **settings) -> Iterator[tuple]:
    """A job that has been started, its channel, and what it says."""
    job, sock = start_fake(*what, **settings)
    sock.settimeout(PATIENT_S)
    try:
        with closing(Channel(sock, FromJob)) as channel:
            yield job, channel, messages_of(channel)
    finally:
        job.kill()


def test_a_pack_may_lie_in_many_segments_and_in_several_extents_of_each(segments):
    numbers = range(MAX_DESCRIPTORS)
    for number in numbers:
        segments.create(number, 5 * PAGE)
    extents = [(number, page * PAGE, PAGE) for page in (3, 1) for number in numbers]
    places = np.array([(number << PLACE_BITS) | offset for number, offset, _ in extents])
    path = "/fake/a?blocks=" + ",".join([str(PAGE)] * len(extents))
    with started(path) as (_, channel, messages):
        assert isinstance(next(messages), Opened)
        assert isinstance(next(messages), Checked)
        channel.send(Place(places.tobytes(), extents), list(map(segments.descriptor, numbers)))
        assert isinstance(next(messages), Done)
    empty, full = bytes(PAGE), content_of(path) * PAGE
    for number in numbers:
        found = os.pread(segments.descriptor(number), 5 * PAGE, 0)
        assert found == empty + full + empty + full + empty


def test_a_job_says_what_the_system_gives_it_no_memory_for(segments):
    segments.create(0, PAGE)
    places, too_large = np.zeros(1, np.int64), 1 << 47  # more than a process has addresses for
    with started() as (_, channel, messages):
        assert isinstance(next(messages), Opened)
        assert isinstance(next(messages), Checked)
        channel.send(Place(places.tobytes(), [(0, 0, too_large)]), [segments.descriptor(0)])
        failure = next(messages)
    assert failure.kind is FailureKind.NO_MEMORY
    assert f"{too_large} bytes of host memory cannot be mapped" in failure.message


def held_by_a_job() -> set[str]:
    """The descriptors of one that has begun, those of standard streams left out."""
    with started() as (job, _, messages):
        assert isinstance(next(messages), Opened)
        held = {path.name for path in Path(f"/proc/{job._pid}/fd").iterdir()}
    return held - {"0", "1", "2"}


def test_a_job_has_no_other_descriptor_and_is_soon_there_whatever_their_limit_is(monkeypatch):
    def one_by_one(low, high):  # as Python does where it was built for older Linuxes
        for number in range(low, high):
            with suppress(OSError):
                os.close(number)

    monkeypatch.setattr(os, "closerange", one_by_one)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1 << 30, 1 << 30))
    assert len(held_by_a_job()) == 1


def test_a_job_has_no_other_descriptor_where_the_system_does_not_list_them(monkeypatch):
    listdir = os.listdir

    def fail(path):
        if path == "/proc/self/fd":
            raise FileNotFoundError(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", fail)
    assert len(held_by_a_job()) == 1


@pytest.mark.skipif(not sandbox.landlock_version(), reason="no Landlock here")
def test_a_job_is_confined_before_it_opens_an_adapter(tmp_path):
    class Reader(FakeReader):
        def open(self, path, rules):
            Path(path).read_text()
            return super().open(path, rules)

    def begin(name):
        with started(str(tmp_path / name), Reader(), **settings) as (job, _, messages):
            said = next(messages)
            limited = (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE)
            return said, [resource.prlimit(job._pid, number) for number in limited]

    for name in ("root", "directory", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    settings = {
        "allowed_roots": [str(tmp_path / "root")],
        "directories": [str(tmp_path / "directory")],
        "timeout_s": 8.0,
    }
    for name in ("root", "directory"):
        said, limits = begin(f"{name}/file")
        assert isinstance(said, Opened)
        assert limits == [(9, 10), (0, 0)]
    said, _ = begin("elsewhere/file")
    assert "Permission denied" in said.message


def test_a_job_that_the_kernel_has_ended_has_failed_for_memory():
    job, sock = start_fake()
    with sock:
        os.kill(job._pid, signal.SIGKILL)
        os.waitid(os.P_PID, job._pid, os.WEXITED | os.WNOWAIT)
        end = job.gone()
    assert end is not None
    assert end.kind is FailureKind.NO_MEMORY


def test_a_job_is_there_until_it_has_ended_and_nobody_else_is_killed_then(monkeypatch):
    """Its memory is used again when it has gone, and its number by the system."""
    job, sock = start_fake()
    with sock:
        assert job.gone() is None
        job.kill()
        os.waitid(os.P_PID, job._pid, os.WEXITED | os.WNOWAIT)
        assert job.gone() is not None
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("that may be another process by now"))
    job.kill()


def test_a_job_on_a_thread_is_there_until_it_has_ended():
    load = Load(1, Binding("server", None, 1), "/fake/a", [], [], StoreSettings())
    job, sock = ThreadRunner().start(load, FakeReader())
    with sock:
        sock.settimeout(PATIENT_S)
        with closing(Channel(sock, FromJob)) as channel:
            assert isinstance(next(messages_of(channel)), Opened)
            assert job.gone() is None
    job._thread.join(PATIENT_S)
    assert job.gone() is not None


def test_jobs_end_where_whoever_has_started_the_store_ignores_the_ends_of_children(monkeypatch):
    """Who asks for their exit codes is told then that there are no such children."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        job, sock = start_fake()
        sock.close()
        deadline = time.monotonic() + PATIENT_S
        while job.gone() is None:
            assert time.monotonic() < deadline
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_job_that_cannot_be_started_leaves_no_descriptor(monkeypatch):
    def fail():
        raise OSError(errno.EAGAIN, "too many processes")

    monkeypatch.setattr(os, "fork", fail)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="too many processes"):
        start_fake()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("stat", "schedstat", "use"),
    [
        ("7 (a) R (b) S 1 2 3 4 5 6 7 8 9 10 300 200 0", "4500000000 8 9", Use(4.5, False)),
        ("7 (a) R 1 2 3 4 5 6 7 8 9 10 300 200 0", None, Use(500 / TICKS, True)),
        ("7 (a) R 1 2 3", "4500000000 8 9", Use(0.0, False)),
        (None, None, Use(0.0, False)),
    ],
    ids=["hostile name", "without finer times", "not understood", "gone"],
)
def test_what_a_job_does_with_the_processor_is_what_the_system_says(tmp_path, stat, schedstat, use):
    for name, content in (("stat", stat), ("schedstat", schedstat)):
        if content is not None:
            (tmp_path / name).write_text(content)
    assert runner._use(str(tmp_path)) == use


def test_a_job_that_cannot_even_say_what_went_wrong_ends(monkeypatch):
    def fail(*arguments):
        raise MemoryError("for an answer")

    monkeypatch.setattr(runner, "run_job", fail)
    test = os.getpid()
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        try:
            job, sock = start_fake()
        finally:
            if os.getpid() != test:
                os._exit(7)
    with sock:
        sock.settimeout(PATIENT_S)
        assert sock.recv(1) == b""
    _, status = os.waitpid(job._pid, 0)
    assert os.waitstatus_to_exitcode(status) == 1
