"""The usage log: whole lines, none of them in anybody's way, and said where some are missing."""

import errno
import json
import multiprocessing
import os
import threading
import time
from types import SimpleNamespace

import pytest

from vllm_multilora.errors import ConfigError
from vllm_multilora.metering import usage_log
from vllm_multilora.metering.usage_log import Status, Usage, UsageLog

BIG = 1 << 40


def lines(folder) -> list[dict]:
    """All lines, of the log and of those before it."""
    return [
        json.loads(line)
        for path in sorted(folder.iterdir())
        for line in path.read_text().splitlines()
    ]


def test_a_line_says_who_used_what(tmp_path):
    log = UsageLog(tmp_path / "usage", BIG)
    log.write(Usage("id", "acme", "support", "french", "d" * 64, 10, 4, 3, Status.ABORTED))
    log.close()
    (line,) = lines(tmp_path)
    assert line.pop("time").endswith("Z")
    assert line == {
        "request_id": "id",
        "tenant": "acme",
        "route": "support",
        "adapter": "french",
        "version": "d" * 64,
        "prompt_tokens": 10,
        "cached_prompt_tokens": 4,
        "generation_tokens": 3,
        "status": "aborted",
    }
    assert (tmp_path / "usage").stat().st_mode & 0o777 == 0o600


def test_no_client_writes_more_than_a_line_by_the_id_it_gives(tmp_path):
    log = UsageLog(tmp_path / "usage", BIG)
    longest = f"cmpl-{'y' * 249}-7"
    for name in (f"cmpl-{'x' * 1_000_000}-7", "é\n" * 200 + "-7", longest):
        log.write(Usage(name))
    log.close()
    assert lines(tmp_path)[-1]["request_id"] == longest
    assert (tmp_path / "usage").stat().st_size < 4_000
    for line in lines(tmp_path):
        assert len(line["request_id"]) <= 256
        assert line["request_id"].endswith("-7")


def test_it_goes_on_where_it_ended(tmp_path):
    for number in range(3):
        log = UsageLog(tmp_path / "usage", BIG)
        log.write(Usage(f"{number}"))
        log.close()
    assert [line["request_id"] for line in lines(tmp_path)] == ["0", "1", "2"]


def write_many(path, name):
    log = UsageLog(path, 4_000)
    for number in range(300):
        log.write(Usage(f"{name}-{number}"))
    log.close()


def test_several_servers_share_it_and_it_begins_anew_at_its_size(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path / "usage", n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = [line["request_id"] for line in lines(tmp_path)]
    assert len(list(tmp_path.iterdir())) > 1
    assert sorted(found) == sorted(f"{name}-{number}" for name in range(3) for number in range(300))


def test_others_may_rename_and_empty_it_while_it_is_written(tmp_path):
    path, log = tmp_path / "usage", UsageLog(tmp_path / "usage", BIG)

    def written(name):
        log.write(Usage(name))
        deadline = time.monotonic() + 60
        while not path.exists() or name not in path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    written("first")
    path.rename(tmp_path / "usage.1")
    written("second")
    os.truncate(path, 0)
    written("third")
    log.close()
    assert [line["request_id"] for line in lines(tmp_path)] == ["third", "first"]


def test_a_link_stays_and_what_it_leads_to_begins_anew(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    link = tmp_path / "usage"
    link.symlink_to(disk / "june")
    for number in range(3):
        log = UsageLog(link, 1)  # every line reaches it
        log.write(Usage(f"{number}"))
        log.close()
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [disk, link]
    assert sorted(line["request_id"] for line in lines(disk)) == ["0", "1", "2"]


def test_a_log_that_cannot_be_renamed_grows_and_loses_nothing(tmp_path, caplog):
    path = tmp_path / ("x" * 250)  # with a time added, that is too long a name
    for number in range(3):
        log = UsageLog(path, 1)
        log.write(Usage(f"{number}"))
        log.close()
    assert [line.get("request_id") for line in lines(tmp_path)] == ["0", "1", "2"]
    assert "cannot be renamed: [Errno 36]" in caplog.text


def test_half_a_line_of_a_server_that_was_killed_costs_no_other_line(tmp_path):
    (tmp_path / "usage").write_bytes(b'{"time":"2026-01-31T12:00:00.123Z","requ')
    log = UsageLog(tmp_path / "usage", BIG)
    log.write(Usage("after"))
    log.close()
    half, whole = (tmp_path / "usage").read_text().splitlines()
    assert half == '{"time":"2026-01-31T12:00:00.123Z","requ'
    assert json.loads(whole)["request_id"] == "after"


@pytest.fixture
def disk(monkeypatch):
    """Is stuck from the first line on, until it may go on."""
    disk = SimpleNamespace(is_stuck=threading.Event(), go_on=threading.Event())
    append = UsageLog._append

    def slow(self, content):
        disk.is_stuck.set()
        assert disk.go_on.wait(60)
        append(self, content)

    monkeypatch.setattr(UsageLog, "_append", slow)
    return disk


def test_a_line_that_waits_for_the_disk_has_the_time_of_its_prompts_end(
    tmp_path, monkeypatch, disk
):
    log = UsageLog(tmp_path / "usage", BIG)
    log.write(Usage("first"))
    assert disk.is_stuck.wait(60)
    clock = SimpleNamespace(time=lambda: 1_750_000_000.123)
    monkeypatch.setattr(usage_log, "time", clock)
    log.write(Usage("waits"))
    clock.time = lambda: 1_750_003_600.0  # an hour later
    disk.go_on.set()
    log.close()
    assert lines(tmp_path)[-1]["request_id"] == "waits"
    assert lines(tmp_path)[-1]["time"] == "2025-06-15T15:06:40.123Z"


def test_a_slow_disk_costs_lines_and_no_time_and_the_log_says_how_many(tmp_path, disk):
    counted = []
    log = UsageLog(tmp_path / "usage", BIG, most_queued=2, on_dropped=counted.append)
    log.write(Usage("first"))
    assert disk.is_stuck.wait(60)
    for number in range(5):  # two may wait
        log.write(Usage(f"{number}"))
    disk.go_on.set()
    log.close()
    found = lines(tmp_path)
    assert [line["request_id"] for line in found if "request_id" in line] == ["first", "0", "1"]
    assert [line["dropped"] for line in found if "dropped" in line] == counted == [3]


@pytest.fixture
def full(monkeypatch):
    """While it is set, half of a line can be written, and no more."""
    is_full, write = threading.Event(), os.write

    def filling(descriptor, content):
        if not is_full.is_set():
            return write(descriptor, content)
        if len(content) > 10:
            return write(descriptor, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(usage_log.os, "write", filling)
    return is_full


def test_lines_wait_for_room_on_a_full_disk_and_the_log_says_so(
    tmp_path, monkeypatch, caplog, full
):
    has_failed, complain = threading.Event(), UsageLog._complain

    def reported(self, why):
        complain(self, why)
        has_failed.set()

    monkeypatch.setattr(usage_log, "_RETRY_S", 0.01)
    monkeypatch.setattr(UsageLog, "_complain", reported)
    log = UsageLog(tmp_path / "usage", BIG)
    full.set()
    log.write(Usage("first"))
    assert has_failed.wait(60)
    assert (tmp_path / "usage").read_bytes() == b""
    log.write(Usage("second"))
    full.clear()
    log.close()
    assert [line["request_id"] for line in lines(tmp_path)] == ["first", "second"]
    assert "wait, as they cannot be written: [Errno 28] No space left on device" in caplog.text


def test_a_server_that_ends_waits_for_no_room_and_says_what_is_lost(tmp_path, caplog, full):
    log = UsageLog(tmp_path / "usage", BIG)
    full.set()
    log.write(Usage("lost"))
    log.close()
    assert (tmp_path / "usage").read_bytes() == b""
    assert "lacks 1 line that could not be written: [Errno 28]" in caplog.text


def test_a_log_that_has_gone_and_cannot_be_made_again_closes_nobody_elses_file(
    tmp_path, monkeypatch
):
    """Gone after it was opened, and before it was locked."""
    path = tmp_path / "usage"
    log = UsageLog(path, BIG)
    opened, others = usage_log._open, []

    def gone(_):
        monkeypatch.setattr(usage_log, "_open", refused)
        descriptor = opened(path)
        path.unlink()
        return descriptor

    def refused(_):
        others.append(os.open(os.devnull, os.O_RDONLY))  # gets the number that is free
        raise PermissionError("gone")

    monkeypatch.setattr(usage_log, "_open", gone)
    log.write(Usage("lost"))
    log.close()
    assert others
    for other in others:
        os.close(other)


def test_a_folder_that_is_not_there_is_said_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written to: No such file"):
        UsageLog(tmp_path / "nowhere" / "usage", BIG)
