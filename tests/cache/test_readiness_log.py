"""The readiness log between processes, and what it leaves behind: nothing."""

import multiprocessing
import os
import re
import signal
import stat
import time
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cache import log_processes
from vllm_multilora.cache import shared_segment
from vllm_multilora.cache.readiness_events import Lost, Missed, Ready
from vllm_multilora.cache.readiness_log import ReadinessLog, attach_writer
from vllm_multilora.cache.shared_log import SharedLogError
from vllm_multilora.cache.shared_segment import (
    SharedSegmentError,
    create_segment,
    open_segment,
    remove_stale_segments,
    segment_folder,
    segment_name,
)

SPAWN = multiprocessing.get_context("spawn")
PATIENCE_S = 60.0


@pytest.fixture
def folder(tmp_path):
    """A folder for the logs of this test alone, so that tests may run side by side."""
    folder = tmp_path / "shm"
    folder.mkdir()
    return folder


@contextmanager
def running(function, *arguments):
    process = SPAWN.Process(target=function, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(PATIENCE_S)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL


def test_processes_write_at_the_same_time_and_every_event_arrives_in_order(folder):
    ranks, count, capacity = 3, 600, 32
    attached = SPAWN.Semaphore(0)
    room = [SPAWN.Semaphore(capacity) for _ in range(ranks)]
    log = ReadinessLog("engine", ranks, capacity=capacity, folder=folder)
    assert log.missing_ranks() == [0, 1, 2]
    found = [[] for _ in range(ranks)]
    with ExitStack() as stack:
        for rank in range(ranks):
            arguments = (log.path, rank, count, attached, room[rank])
            stack.enter_context(running(log_processes.write_events, *arguments))
        for _ in range(ranks):
            assert attached.acquire(timeout=PATIENCE_S)
        assert log.missing_ranks() == []
        log.seal()
        assert list(folder.iterdir()) == []
        end = time.monotonic() + PATIENCE_S
        while min(map(len, found)) < count:
            assert time.monotonic() < end, f"only {list(map(len, found))} events came"
            for rank, event in log.drain():
                found[rank].append(event)
                room[rank].release()
    assert found == [log_processes.events_of(rank, count) for rank in range(ranks)]
    assert log.drain() == []
    log.close()


def test_a_writer_killed_while_writing_leaves_whole_events_and_nothing_else(folder):
    attached = SPAWN.Semaphore(0)
    log = ReadinessLog("engine", 2, folder=folder)
    own = attach_writer(log.path, 1)
    with running(log_processes.write_until_killed, log.path, 0, attached) as process:
        assert attached.acquire(timeout=PATIENCE_S)
        log.seal()
        kill(process)
    own.append(Lost(9))
    found = [entry for _ in range(50) for entry in log.drain()]
    assert found.count((1, Lost(9))) == 1
    whole = [event for rank, event in found if rank == 0 and not isinstance(event, Missed)]
    assert whole == [Ready(0, event.serial) for event in whole]
    assert all(later.serial > event.serial for event, later in pairwise(whole))
    assert list(folder.iterdir()) == []
    own.close()
    log.close()


@pytest.mark.parametrize("place", ["a folder", "shared memory"])
def test_what_a_killed_engine_left_is_removed_by_the_next_start(place, tmp_path):
    folder = tmp_path if place == "a folder" else segment_folder()
    created = SPAWN.Queue()
    with running(log_processes.create_and_hold, "engine", folder, created) as process:
        path = created.get(timeout=PATIENCE_S)
        other = ReadinessLog("other", 1, folder=folder)
        assert path.exists()  # Its engine lives.
        kill(process)
    assert path.exists()
    log = ReadinessLog("engine", 1, folder=folder)
    assert not path.exists()
    assert log.path.exists()
    assert other.path.exists()
    log.close()
    other.close()
    mine = segment_name("engine").removesuffix("engine")
    assert list(folder.glob(f"{mine}*")) == []


def test_a_sealed_log_has_no_name_and_goes_on(folder):
    log = ReadinessLog("engine", 1, folder=folder)
    writer = attach_writer(log.path, 0)
    log.seal()
    log.seal()
    assert list(folder.iterdir()) == []
    writer.append(Ready(1, 1))
    assert log.drain() == [(0, Ready(1, 1))]
    writer.close()
    log.close()
    log.close()


def test_an_engine_that_ends_without_closing_leaves_nothing(folder):
    created = SPAWN.Queue()
    with running(log_processes.create_and_exit, "engine", folder, created) as process:
        created.get(timeout=PATIENCE_S)
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    assert list(folder.iterdir()) == []


def test_a_forked_child_that_ends_does_not_take_the_name_along(folder):
    log = ReadinessLog("engine", 1, folder=folder)
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            log.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert log.path.exists()
    log.close()


def test_two_engines_of_one_process_stay_apart(folder):
    logs = [ReadinessLog(name, 1, folder=folder) for name in ("one", "two")]
    writers = [attach_writer(log.path, 0) for log in logs]
    writers[0].append(Ready(1, 1))
    writers[1].append(Lost(2))
    assert [log.drain() for log in logs] == [[(0, Ready(1, 1))], [(0, Lost(2))]]
    for each in (*writers, *logs):
        each.close()


def test_an_instance_has_one_log(folder):
    log = ReadinessLog("engine", 1, folder=folder)
    with pytest.raises(SharedSegmentError, match="has a segment for instance 'engine' already"):
        ReadinessLog("engine", 1, folder=folder)
    log.close()


def test_a_log_is_not_sealed_before_all_ranks_have_it(folder):
    log = ReadinessLog("engine", 3, folder=folder)
    writer = attach_writer(log.path, 1)
    with pytest.raises(SharedLogError, match=r"ranks 0, 2 of 3 must attach first"):
        log.seal()
    assert log.path.exists()
    writer.close()
    log.close()
    assert list(folder.iterdir()) == []


def test_attaching_to_a_sealed_log_or_twice_says_why_not(folder):
    outcome = SPAWN.Queue()
    log = ReadinessLog("engine", 1, folder=folder)
    writer = attach_writer(log.path, 0)
    with running(log_processes.try_to_attach, log.path, 0, outcome):
        assert f"rank 0 is written by process {os.getpid()}" in outcome.get(timeout=PATIENCE_S)
    log.seal()
    with pytest.raises(SharedSegmentError, match="cannot be opened: No such file"):
        attach_writer(log.path, 0)
    writer.close()
    log.close()


def test_only_this_user_may_open_a_log(folder):
    log = ReadinessLog("engine", 1, folder=folder)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    log.close()


def test_links_and_empty_files_are_not_opened(folder, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(bytes(64))
    (folder / "link").symlink_to(target)
    with pytest.raises(SharedSegmentError, match="cannot be opened"):
        open_segment(folder / "link")
    (folder / "empty").touch()
    with pytest.raises(SharedSegmentError, match="a regular file of user"):
        open_segment(folder / "empty")


def test_a_full_file_system_is_an_error_at_the_start_and_not_a_signal_later(folder):
    with pytest.raises(SharedSegmentError, match=r"no room .* --shm-size"):
        create_segment("engine", 1 << 55, folder)
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SharedSegmentError, match=r"nowhere.*cannot be created"):
        create_segment("engine", 64, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "instance_id",
    ["a/b", "../../etc/passwd", "", "engine 1", "é", "x" * 500, "\udcff", "a\0b", "."],
)
def test_any_instance_id_makes_a_file_name(instance_id, folder):
    name = segment_name(instance_id)
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name)
    path, memory = create_segment(instance_id, 64, folder)
    memory.close()
    assert path.parent == folder


def test_ids_that_look_alike_in_a_file_name_stay_different():
    ids = ["a/b", "a_b", "a:b", "x" * 60, "x" * 61]
    assert len({segment_name(instance_id) for instance_id in ids}) == len(ids)


def dead_pid():
    process = SPAWN.Process(target=int)
    process.start()
    process.join(PATIENCE_S)
    return process.pid


def test_only_stale_segments_of_this_project_and_namespace_are_removed(folder):
    _, space, pid, started, _ = segment_name("engine").removeprefix("vllm-").split("-", 4)
    dead = dead_pid()
    stale = {
        "dead": f"vllm-multilora-{space}-{dead}-{started}-engine",
        "id used again": f"vllm-multilora-{space}-{pid}-{int(started) - 1}-engine",
    }
    alive = {
        "alive": f"vllm-multilora-{space}-{pid}-{started}-engine",
        "other container": f"vllm-multilora-{int(space) + 1}-{dead}-{started}-engine",
        "another's": f"psm_{space}-{dead}-{started}-engine",
        "no such name": "vllm-multilora-engine",
    }
    for name in (stale | alive).values():
        (folder / name).touch()
    removed = remove_stale_segments(folder)
    assert sorted(path.name for path in removed) == sorted(stale.values())
    assert sorted(path.name for path in folder.iterdir()) == sorted(alive.values())


def test_a_zombie_counts_as_dead(folder):
    child = os.fork()
    if child == 0:
        os._exit(0)
    started = None
    end = time.monotonic() + PATIENCE_S
    while started is None and time.monotonic() < end:
        fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
        started = fields[19] if fields[0] == "Z" else None
    space = segment_name("engine").split("-")[2]
    (folder / f"vllm-multilora-{space}-{child}-{started}-engine").touch()
    assert len(remove_stale_segments(folder)) == 1
    os.waitpid(child, 0)


def test_without_shared_memory_the_folder_for_temporary_files_serves(tmp_path, monkeypatch):
    memory, temporary = tmp_path / "memory", tmp_path / "temporary"
    for each in (memory, temporary):
        each.mkdir()
    monkeypatch.setattr(shared_segment, "_SHARED_MEMORY", memory)
    monkeypatch.setattr(shared_segment.tempfile, "gettempdir", lambda: str(temporary))
    assert segment_folder() == memory
    memory.rmdir()
    log = ReadinessLog("engine", 1)
    assert log.path.parent == temporary
    log.close()
