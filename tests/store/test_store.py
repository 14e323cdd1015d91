"""A store in a process of its own: what engines and workers see of it."""

import contextlib
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import multilora_kernels
import vllm_multilora
from tests.store.conftest import FAKE, PATIENT_S, Engine, is_writable
from tests.store.fake_reader import FakeReader, content_of
from vllm_multilora.failures import FailureKind
from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.connections import Connection
from vllm_multilora.store.jobs.job_pool import BRIEF_S
from vllm_multilora.store.jobs.runner import BACKGROUND_NICENESS, ThreadRunner
from vllm_multilora.store.loads.queue import Purpose
from vllm_multilora.store.memory.entries import Client
from vllm_multilora.store.memory.mapper import SegmentMapper
from vllm_multilora.store.protocol import store_folder as folder
from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.messages import (
    PROTOCOL,
    Configure,
    Describe,
    Evicted,
    Forgotten,
    FromClient,
    FromStore,
    Hello,
    Loaded,
    LoadRequest,
    Refused,
    Restarted,
    StoreSettings,
    Totals,
)
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.store.server import StoreServer
from vllm_multilora.store.store_launch import StoreProcess, StoreThread

pytestmark = pytest.mark.waits

MIB = 1 << 20
AUTOGROUP = Path("/proc/self/autogroup")


class FakeDevice:
    """Notes which segments are registered with it."""

    def __init__(self):
        self.added, self.dropped = [], []

    def add(self, number, address, size):
        self.added.append(number)

    def drop(self, number):
        self.dropped.append(number)


def test_a_store_is_up_soon_and_small(engines):
    begun = time.perf_counter()
    engine = engines()
    seconds = time.perf_counter() - begun
    store = engine.store()
    mib = store.memory_info().rss / MIB
    print(f"up in {seconds:.2f} s, {mib:.1f} MiB")
    assert seconds < 2.0
    assert mib < 60
    assert store.num_threads() == 1


def test_a_worker_reads_what_a_job_packed(engine):
    path = "/fake/a?blocks=64,4096,131072"
    pack = engine.load(1, path).pack
    mapper = SegmentMapper(engine.client.address, "server")
    assert bytes(mapper.view(pack.index_place, 131072, pack.segments)) == content_of(path) * 131072
    assert mapper.address(pack.index_place, pack.segments) % 64 == 0
    mapper.close()


@pytest.mark.parametrize("device", [None, FakeDevice()], ids=["alone", "registered"])
def test_host_memory_is_mapped_read_only_unless_it_is_registered_with_a_device(engine, device):
    pack = engine.load(1, "/fake/a").pack
    mapper = SegmentMapper(engine.client.address, "server", device)
    is_registered = device is not None
    assert is_writable(mapper.address(pack.index_place, pack.segments)) == is_registered
    with pytest.raises(TypeError, match="read-only"):
        mapper.view(pack.index_place, 64, pack.segments)[0] = 1
    mapper.close()


def test_a_worker_learns_when_to_register_and_when_to_let_go(engines):
    engine = engines(budget_bytes=80 * MIB)
    device = FakeDevice()
    mapper = SegmentMapper(engine.client.address, "server", device)
    pack = engine.load(1, f"/fake/a?blocks={60 * MIB}").pack
    mapper.address(pack.index_place, pack.segments)
    mapper.address(pack.index_place, pack.segments)
    assert (device.added, device.dropped) == (pack.segments, [])
    engine.client.release(pack.pack)
    # This one needs a segment as large as the budget: the other one has to go.
    engine.load(2, f"/fake/b?blocks={79 * MIB}")
    mapper.drop_closed()
    assert device.added == device.dropped == [pack.segments[0]]
    with pytest.raises(StoreUnavailableError, match="no segment"):
        mapper.address(pack.index_place, pack.segments)
    mapper.close()


def test_engines_of_one_machine_share_a_store_and_its_adapters(engines):
    one, two = engines("one"), engines("two")
    first, second = one.load(1, "/fake/a"), two.load(9, "/fake/a")
    assert one.describe().pid == two.describe().pid
    assert first.pack == second.pack
    assert (first.was_read, second.was_read) == (True, False)


def test_failures_say_what_was_found(engine):
    failed = engine.load(1, "/fake/a?fail=no+such+thing")
    assert (failed.kind, failed.message) == (FailureKind.INVALID, "no such thing")
    crashed = engine.load(2, "/fake/b?crash=1")
    assert crashed.kind is FailureKind.INTERNAL
    assert "ended with code 3" in crashed.message
    starved = engine.load(3, "/fake/c?bus=1")
    assert starved.kind is FailureKind.NO_MEMORY
    assert "/dev/shm" in starved.message
    assert engine.describe().totals.bytes == 0


def test_a_check_that_uses_up_its_processor_time_has_timed_out(engines):
    failed = engines(timeout_s=20.0).load(1, "/fake/a?exhaust=1")
    assert failed.kind is FailureKind.TIMEOUT
    assert "processor time" in failed.message
    assert "21 s, from the time limit of 20 s" in failed.message


def test_a_full_arena_makes_room_and_says_who_left(engines):
    engine = engines(budget_bytes=MIB)
    first = engine.load(1, f"/fake/a?blocks={MIB}").pack
    engine.client.release(first.pack)
    engine.load(2, f"/fake/b?blocks={MIB}")
    engine.until(lambda: Evicted(first.pack) in engine.seen)
    engine.until(lambda: Totals(MIB, 1, MIB, None) in engine.seen)


def test_an_engine_that_does_not_read_gets_the_newest_state_later(
    store_folder,
):
    """An engine that waits for its workers reads only when it loads an adapter."""
    said = []
    channel = SimpleNamespace(pending=0, send=said.append)
    path = folder.socket_path(store_folder)
    server = StoreServer(folder.listen(path), ThreadRunner(), FakeReader())
    server._connections[-1] = Connection(-1, channel)
    server._registry.clients[-1] = Client(-1, "engine", "server", 1)

    def change(adapters):
        server._registry.memory.allow([CpuBudget(adapters)])
        server._totals_sent = 0.0
        server._tell_totals()

    change(1)
    channel.pending = 1
    for adapters in range(2, 1000):
        change(adapters)
    channel.pending = 0
    server._tell_totals()
    assert [totals.adapters_limit for totals in said] == [1, 999]
    server._connections.clear()
    server._close()


def test_who_comes_later_learns_what_is_in_memory_though_nothing_changes(engines):
    settled = Totals(MIB, 1, 4 * MIB, None)
    first = engines("first", budget_bytes=4 * MIB)
    first.load(1, f"/fake/a?blocks={MIB}")
    first.until(lambda: settled in first.seen)
    assert first.client.poll(0.2) == []  # long enough for the store to have nothing left to tell
    second = engines("second", budget_bytes=4 * MIB)
    second.until(lambda: settled in second.seen)


def test_loads_that_hang_do_not_hold_up_another(engine):
    for adapter in range(40):
        engine.client.request_load(LoadRequest(adapter, "hangs", f"/fake/{adapter}?hang=600"))
    begun = time.perf_counter()
    assert isinstance(engine.load(99, "/fake/sane"), Loaded)
    assert time.perf_counter() - begun < 20.0  # 50 ms for each on a quiet machine


def test_a_load_that_hangs_is_killed_at_its_time(engines):
    engine = engines(timeout_s=0.5)
    failed = engine.load(1, "/fake/a?hang=600")
    assert failed.kind is FailureKind.TIMEOUT
    store = engine.store()
    engine.until(lambda: not store.children())


def test_a_killed_store_is_started_again_and_no_load_request_is_lost(engine):
    loaded = engine.load(1, "/fake/a")
    store = engine.store()
    engine.until(lambda: not store.children())
    ticket = engine.client.request_load(LoadRequest(2, "slow", "/fake/b?sleep=2"))
    engine.until(lambda: bool(store.children()))
    (job,) = store.children()
    # Until it has closed what it has of the store, a client can reach the listening socket there.
    engine.until(lambda: len(job.net_connections("unix")) == 1)
    store.kill()
    answer = engine.answer(ticket)
    assert isinstance(answer, Loaded)
    assert engine.seen.count(Restarted()) == 1
    assert engine.seen.index(Restarted()) < engine.seen.index(answer)
    assert engine.describe().pid != store.pid
    again = engine.load(1, "/fake/a")
    assert again.was_read
    assert again.pack.pack != loaded.pack.pack
    assert not set(again.pack.segments) & set(loaded.pack.segments)
    psutil.wait_procs([job], timeout=5)
    assert not job.is_running() or job.status() == psutil.STATUS_ZOMBIE, "a job without its store"


def test_who_hears_of_a_stores_end_does_not_reach_it_again(engine):
    path = Path(engine.client.address.removeprefix("unix:"))
    for _ in range(3):
        store = engine.store()
        with folder.connect(path) as client:
            engine.describe()  # its connection has been accepted as well
            store.kill()
            with contextlib.suppress(ConnectionResetError):
                while client.recv(1 << 16):
                    pass  # until its end
            with pytest.raises(ConnectionRefusedError):
                folder.connect(path)
        engine.seen.clear()
        engine.until(lambda: Restarted() in engine.seen)


def test_a_worker_that_registers_maps_what_the_store_makes_before_it_needs_it(engines):
    engine = engines(budget_bytes=80 * MIB)
    device = FakeDevice()
    early = SegmentMapper(engine.client.address, "server", device)
    early.map_opened()
    assert device.added == []
    pack = engine.load(1, f"/fake/a?blocks={60 * MIB}").pack
    assert early.wait(10)
    early.map_opened()
    late = SegmentMapper(engine.client.address, "server", device)
    late.map_opened()  # connects; what there is already, it is told too, at once or soon
    if device.added == pack.segments:
        assert late.wait(10)
        late.map_opened()
    assert device.added == pack.segments * 2
    for mapper in (early, late):
        mapper.address(pack.index_place, pack.segments)
        assert not mapper.wait(0)
        mapper.close()
    assert device.added == pack.segments * 2


def test_a_device_never_has_more_registered_than_the_budget(engines):
    budget, registered = 80 * MIB, {}

    class Device:
        def add(self, number, address, size):
            registered[number] = size
            assert sum(registered.values()) <= budget

        def drop(self, number):
            del registered[number]

    engine = engines(budget_bytes=budget)
    mapper = SegmentMapper(engine.client.address, "server", Device())
    mapper.map_opened()
    for number, size in enumerate((60, 79), 1):  # the second takes a segment of its own
        pack = engine.load(number, f"/fake/{number}?blocks={size * MIB}").pack
        assert mapper.wait(10)
        mapper.map_opened()
        assert list(registered) == pack.segments
        engine.client.release(pack.pack)
    mapper.close()


def test_a_worker_that_registers_nothing_is_notified_of_no_segment(engine):
    mapper = SegmentMapper(engine.client.address, "server")
    mapper.map_opened()
    engine.load(1, "/fake/a")
    mapper.map_opened()
    assert not mapper.wait(0)
    assert not mapper._segments
    mapper.close()


@pytest.mark.parametrize(
    ("said", "reason"),
    [([Refused("no descriptor left")], "refuses: no descriptor left"), ([], "has not answered")],
    ids=["refused", "no-answer"],
)
def test_a_worker_that_gets_no_segment_says_why(store_folder, monkeypatch, said, reason):
    monkeypatch.setattr("vllm_multilora.store.memory.mapper._ANSWER_S", 0.01)
    path = store_folder / "s.sock"
    with folder.listen(path) as listener:
        mapper = SegmentMapper(f"unix:{path}", "server")
        with contextlib.closing(Channel(listener.accept()[0], FromClient)) as store:
            for message in said:
                store.send(message)
            with pytest.raises(StoreUnavailableError, match=reason):
                mapper.address(0, [1])
        mapper.close()
    assert mapper.wait(0), "there is something to do: it is not connected"


def test_between_copies_a_worker_gives_back_the_memory_of_a_store_that_has_died(engine):
    device = FakeDevice()
    mapper = SegmentMapper(engine.client.address, "server", device)
    pack = engine.load(1, "/fake/a").pack
    mapper.address(pack.index_place, pack.segments)
    engine.store().kill()
    engine.until(lambda: Restarted() in engine.seen)
    again = engine.load(1, "/fake/a").pack
    # In the middle of a copy nothing is unmapped.
    mapper.address(again.index_place, again.segments)
    assert device.dropped == []
    mapper.drop_closed()
    assert device.dropped == pack.segments
    mapper.close()
    assert device.dropped == [*pack.segments, *again.segments]


def test_the_time_that_a_store_is_frozen_is_not_its_jobs(engines):
    engine = engines(timeout_s=1.0)
    engine.load(1, "/fake/a")
    store = engine.store()
    ticket = engine.client.request_load(LoadRequest(2, "slow", "/fake/b?sleep=0.5"))
    engine.until(lambda: bool(store.children()))
    store.suspend()
    time.sleep(2.5)  # longer than the job may take, and than the store sleeps by itself
    store.resume()
    assert isinstance(engine.answer(ticket), Loaded)


def test_nor_is_it_where_the_store_is_frozen_while_it_hears_somebody(store_folder):
    server = StoreServer(folder.listen(store_folder / "store.sock"), ThreadRunner(), FakeReader())
    queue, before = server._registry.loads.queue, time.monotonic() - 3
    queue.add(1, "server", ["owner"], Purpose.REQUEST, timeout_s=1.0)
    assert queue.start_next(before) == 1
    server._awake = before  # it has slept no more since, and hears of this now
    server._settle()
    assert queue.overdue(time.monotonic()) == []
    server._close()


def test_a_client_that_dies_gives_its_leases_back(engines, tmp_path):
    engine = engines(budget_bytes=MIB)
    code = f"""
import sys, time
from tests.store.conftest import Engine
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.store_launch import StoreProcess
engine = Engine(StoreClient(StoreProcess({FAKE!r}), "other"), budget_bytes={MIB})
engine.load(1, "/fake/a?blocks={MIB}")
print("loaded", flush=True)
time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"loaded\n"
    ticket = engine.client.request_load(LoadRequest(2, "waits", f"/fake/b?blocks={MIB}"))
    other.kill()
    other.wait()
    other.stdout.close()
    assert isinstance(engine.answer(ticket), Loaded)


def test_a_store_ends_with_its_last_client(engine):
    store = engine.store()
    engine.client.close()
    store.wait(timeout=10)


def test_a_store_outlives_the_engine_that_started_it(engines):
    code = f"""
from tests.store.conftest import Engine
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.store_launch import StoreProcess
print(Engine(StoreClient(StoreProcess({FAKE!r}), "first")).describe().pid)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert engines().describe().pid == int(done.stdout)


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel does not group sessions")
def test_store_session_gets_a_full_share_of_busy_processors(engine):
    # Empty for a process of the first session, which has no group.
    ours = AUTOGROUP.read_text().split()
    name, _, niceness = Path(f"/proc/{engine.store().pid}/autogroup").read_text().split()
    assert name not in ours
    assert niceness == "0"


@pytest.mark.parametrize(("sleep_s", "busy_s"), [(9.0, 0.0), (0.0, 5.0)], ids=["brief", "long"])
def test_job_yields_processors_when_it_has_worked_long_and_never_before(engine, sleep_s, busy_s):
    engine.client.request_load(LoadRequest(1, "one", f"/fake/a?sleep={sleep_s}&busy={busy_s}"))
    store = engine.store()
    engine.until(lambda: bool(store.children()))
    (job,) = store.children()

    def has_yielded() -> bool:
        priorities = job.nice(), autogroup_of(job.pid)
        # Read afterwards: a slow machine may take a tenth of a second to start any job.
        assert set(priorities) <= {0, None} or processor_s(job.pid) >= BRIEF_S
        return set(priorities) <= {BACKGROUND_NICENESS, None}

    if busy_s:
        engine.until(has_yielded)
    else:
        for _ in range(10):
            has_yielded()
            time.sleep(0.05)


def processor_s(pid: int) -> float:
    """Processor time that a process has used, from the clock that Linux keeps of each."""
    return time.clock_gettime((~pid << 3) | 2)


def autogroup_of(pid: int) -> int | None:
    """The niceness of a process's session; None where this kernel does not group sessions."""
    path = Path(f"/proc/{pid}/autogroup")
    return int(path.read_text().split()[2]) if path.exists() else None


def test_two_engines_that_start_at_once_start_one_store(engines):
    code = f"""
import time
from tests.store.conftest import Engine
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.store_launch import StoreProcess
print(Engine(StoreClient(StoreProcess({FAKE!r}), "first")).describe().pid, flush=True)
time.sleep(1)
"""
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    assert len({process.communicate()[0] for process in started}) == 1


def test_a_store_ends_cleanly_when_asked_to(engine, store_folder):
    store = engine.store()
    os.kill(store.pid, signal.SIGTERM)
    store.wait(timeout=10)
    assert not [path.name for path in store_folder.iterdir() if path.suffix == ".sock"]


def test_few_descriptors_are_a_clear_failure_and_no_end(engines):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    engine = engines(jobs=400, budget_bytes=None)
    resource.prlimit(engine.store().pid, resource.RLIMIT_NOFILE, (40, hard))
    tickets = [
        engine.client.request_load(LoadRequest(n, "a", f"/fake/{n}?sleep=1")) for n in range(60)
    ]
    failed = [a for a in map(engine.answer, tickets) if not isinstance(a, Loaded)]
    assert failed
    for one in failed:
        assert "ulimit -n" in one.message, one
        assert one.kind is FailureKind.UNREADABLE, "which is answered with 503"
    assert isinstance(engine.load(99, "/fake/sane"), Loaded)


def test_a_refusal_is_heard_by_who_still_speaks_when_the_store_has_closed(engine, monkeypatch):
    send = Channel.send

    def send_and_wait(channel, message, descriptors=()):
        send(channel, message, descriptors)
        if isinstance(message, Hello):
            closed = select.poll()
            closed.register(channel, 0)
            assert closed.poll(PATIENT_S * 1000)

    monkeypatch.setattr("vllm_multilora.store.clients.client.PROTOCOL", 99)
    monkeypatch.setattr(Channel, "send", send_and_wait)
    with pytest.raises(StoreUnavailableError, match="restart the client's server"):
        Engine(StoreClient(StoreProcess(FAKE), "new"))


def test_a_refused_client_that_does_not_read_is_given_up(engine):
    sock = StoreProcess(FAKE).connect()
    sock.setblocking(False)
    refused = Channel(sock, FromStore)
    hello = Hello(PROTOCOL, "observer", "other", os.getpid())
    for message in (hello, *[Describe()] * 2000, hello):  # whose answers fill the socket
        refused.send(message)
    while refused.pending:
        assert select.select([], [sock], [], 10.0)[1]
        refused.flush()
    engine.until(lambda: [one.role for one in engine.describe().clients] == ["engine"])
    refused.close()


def test_a_store_is_started_again_though_its_folder_was_removed(engine, store_folder):
    store = engine.store()
    shutil.rmtree(store_folder)
    store.kill()
    engine.until(lambda: Restarted() in engine.seen)
    assert isinstance(engine.load(1, "/fake/a"), Loaded)


def test_a_worker_reads_what_its_store_has_though_the_socket_was_removed(engine, store_folder):
    mapper = SegmentMapper(engine.client.address, "server")
    shutil.rmtree(store_folder)
    pack = engine.load(1, "/fake/a").pack
    assert bytes(mapper.view(pack.index_place, 64, pack.segments)) == content_of("/fake/a") * 64
    mapper.close()


def test_no_store_is_looked_for_in_a_folder_that_others_have_made_in_its_place(store_folder):
    host = StoreProcess(FAKE)
    store_folder.rmdir()
    store_folder.mkdir()
    store_folder.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(host.path))
        listener.listen()
        with pytest.raises(StoreUnavailableError, match="others can get at it"):
            host.connect()


def test_another_policy_than_the_first_engines_is_noted(engines):
    assert engines("one", policy="lru").notes == []
    assert "'lru'" in engines("two", policy="gdsf").notes[0]


def test_a_process_without_standard_streams_can_start_a_store():
    """The first descriptors that it opens have their numbers."""
    code = f"""
import os
from tests.store.conftest import Engine
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.store_launch import StoreProcess
said = os.dup(1)
os.closerange(0, 3)
pid = Engine(StoreClient(StoreProcess({FAKE!r}), "server")).describe().pid
os.write(said, str(pid).encode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert int(done.stdout) > 1


def test_a_store_that_cannot_come_up_is_given_up_soon_with_its_last_words():
    begun = time.perf_counter()
    client = StoreClient(StoreProcess("no.such.module:Reader"), "server")
    with pytest.raises(StoreUnavailableError, match="No module named 'no'"):
        client.configure([1], StoreSettings())
    client.close()
    assert time.perf_counter() - begun < 10.0


def test_nothing_hides_pythons_own_modules_from_a_store(tmp_path):
    """Among what is installed, often an old package of such a name is, and Python looks last there.

    What a variable names is nothing to a process that was told to ignore it.
    """
    venv.create(tmp_path / "venv", symlinks=True)
    packages = tmp_path / "venv" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib"))
    for package in (vllm_multilora, multilora_kernels):
        (packages / package.__name__).symlink_to(Path(package.__file__).parent)
    (tmp_path / "named").mkdir()
    for hiding in (packages / "pathlib.py", tmp_path / "named" / "selectors.py"):
        hiding.write_text("raise ImportError('of another time')")
    code = """
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.store_launch import StoreProcess
from vllm_multilora.store.protocol.messages import StoreSettings
client = StoreClient(StoreProcess(), "server")
print(client.configure([], StoreSettings()))
client.close()
"""
    done = subprocess.run(
        [tmp_path / "venv/bin/python", "-I", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "named")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_store_has_no_key_of_the_server_that_starts_it(engines, monkeypatch):
    """Its jobs have what it has, and read strangers' files."""
    names = ("MULTILORA_ADMIN_KEY", "MULTILORA_CACHE_SALT", "VLLM_API_KEY")
    for name in names:
        monkeypatch.setenv(name, "a secret")
    monkeypatch.setenv("NO_SECRET", "of the server")
    has = engines().store().environ()
    assert has["NO_SECRET"] == "of the server"
    assert has.keys().isdisjoint(names)


def test_a_waking_thread_notices_the_death_of_the_store(engine):
    woken = threading.Event()
    engine.client.start_waking(woken.set)
    engine.seen += engine.client.poll()
    store = engine.store()
    engine.client.poll()
    woken.clear()
    store.kill()
    assert woken.wait(10)
    engine.until(lambda: Restarted() in engine.seen)


def test_a_stores_log_is_emptied_where_it_has_grown_long(engine, store_folder):
    (path,) = store_folder.glob("store-*.log")
    for said, kept in (("few words\n", 10), ("many words\n" * 200_000, 0)):
        path.write_text(said)
        engine.load(1, f"/fake/{kept}")
        assert path.stat().st_size == kept


HELLO = Hello(PROTOCOL, "engine", "server", 1)
UNKNOWN_POLICY = Configure(b"\x91\x01", StoreSettings(policy="unheard-of"))
NO_BUDGET = Configure(b"\x91\x01", StoreSettings(budget_bytes=-1))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([Describe()], "the first message is Describe, expected Hello"),
        ([HELLO, HELLO], "Hello was said twice"),
        ([HELLO, Configure(b"\xc1", StoreSettings())], "the layouts cannot be understood"),
        ([HELLO, UNKNOWN_POLICY], "unheard-of"),
        ([HELLO, NO_BUDGET], "bytes"),
    ],
    ids=["no-greeting", "two-greetings", "layouts", "policy", "budget"],
)
def test_a_client_that_makes_no_sense_is_refused_alone_with_a_reason(said, reason):
    host, heard = StoreThread(FakeReader()), []
    with contextlib.closing(Channel(host.connect(), FromStore)) as client:
        for message in said:
            client.send(message)
        while not any(isinstance(message, Refused) for message in heard):
            heard += [message for message, _ in client.receive()]
        assert reason in heard[-1].reason
        with pytest.raises(ChannelClosedError, match="has closed"):
            client.receive()
    other = Engine(StoreClient(host, "other"))
    assert isinstance(other.load(1, "/fake/a"), Loaded)
    other.client.close()


def test_the_same_store_runs_on_a_thread(threaded):
    pack = threaded.load(1, "/fake/a").pack
    mapper = SegmentMapper(threaded.client.address, "server")
    assert bytes(mapper.view(pack.index_place, 64, pack.segments)) == content_of("/fake/a") * 64
    mapper.close()
    description = threaded.describe()
    assert (description.mode, description.protection) == ("thread", [])


def test_a_store_on_a_thread_leaves_nothing_behind(store_folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(store_folder))
    host = StoreThread(FakeReader())
    engine = Engine(StoreClient(host, "server"))
    monkeypatch.setattr("vllm_multilora.store.server.LINGER_S", 0.0)
    engine.client.close()
    assert host._thread is not None
    host._thread.join(10)
    assert [path.name for path in store_folder.iterdir()] == ["lock"]


def test_a_store_on_a_thread_makes_its_folder_again(store_folder):
    """Whoever cleans up may have removed it since."""
    host = StoreThread(FakeReader())
    shutil.rmtree(store_folder)
    engine = Engine(StoreClient(host, "server"))
    assert isinstance(engine.load(1, "/fake/a"), Loaded)
    engine.client.close()


def test_a_store_on_a_thread_removes_what_those_before_it_have_left(threaded, store_folder):
    (living,) = store_folder.glob("t-*.sock")
    left = store_folder / f"t-{folder.view()}left.sock"
    elsewhere = store_folder / "t-otherviewleft.sock"  # where its process is, it may live
    for path in (left, elsewhere):
        folder.listen(path).close()
    other = Engine(StoreClient(StoreThread(FakeReader()), "other"))
    assert living.exists()
    assert elsewhere.exists()
    assert not left.exists()
    other.client.close()


@pytest.mark.parametrize(
    ("number", "name", "path"),
    [
        (1, "a", "/adapters/\ud800"),
        (1, "\ud800", "/fake/a"),
        (1 << 63, "a", "/fake/a"),
        (1, "a", None),
    ],
    ids=["path", "name", "number", "no-path"],
)
def test_what_cannot_be_said_to_the_store_fails_alone(threaded, number, name, path):
    def is_refused():
        ticket = threaded.client.request_load(LoadRequest(number, name, path))
        answer = threaded.answer(ticket)
        return (answer.kind, answer.ticket) == (FailureKind.INVALID, ticket)

    assert is_refused()
    threaded.client._lose(ChannelClosedError("it has ended"))
    assert is_refused()
    assert isinstance(threaded.load(2, "/fake/b"), Loaded)


def test_a_job_for_which_there_is_no_thread_fails_its_adapter_alone(threaded, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        failed = threaded.load(1, "/fake/a")
    assert failed.kind is FailureKind.UNREADABLE
    assert "can't start new thread" in failed.message
    assert isinstance(threaded.load(2, "/fake/b"), Loaded)


def test_a_hanging_job_on_a_thread_is_given_up(threaded):
    threaded.notes = threaded.client.configure([1], StoreSettings(timeout_s=0.3))
    assert threaded.load(1, "/fake/a?hang=5").kind is FailureKind.TIMEOUT
    assert isinstance(threaded.load(2, "/fake/b"), Loaded)


def test_nobody_waits_for_a_store_that_is_not_there_to_forget(threaded):
    threaded.client._lose(ChannelClosedError("it has ended"))
    threaded.client.forget(1)
    found = threaded.client.poll()
    assert [type(message) for message in found if not isinstance(message, Totals)] == [
        Restarted,
        Forgotten,
    ]
