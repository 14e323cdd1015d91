"""A file is read again when it changes, and never replaced by one that cannot be used."""

import errno
import logging
import os
import time
from types import SimpleNamespace

import pytest

from vllm_multilora.documents import DocumentError, WatchedFile, watched
from vllm_multilora.routing.routes_file import load_routes, parse_routes

LOGGER = "vllm_multilora.documents.watched"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "routes.yaml"
    write(file, "one")
    return file


@pytest.fixture
def file(path):
    return WatchedFile(path, parse_routes, "routes")


@pytest.fixture
def clock(monkeypatch):
    """The time as `WatchedFile` has it."""
    clock = SimpleNamespace(ns=time.time_ns())
    monkeypatch.setattr(watched, "time", SimpleNamespace(time_ns=lambda: clock.ns))
    return clock


def write(path, name, *, age_s=60):
    """One route of this name, in a file that was last changed some time ago."""
    path.write_text(f"routes: {{{name}: adapter}}")
    stamp = path.stat().st_mtime_ns - age_s * 1_000_000_000
    os.utime(path, ns=(stamp, stamp))


def names(file):
    return list(file.value.targets)


def test_a_changed_file_is_read_again(path, file):
    assert not file.refresh()
    write(path, "two", age_s=50)
    assert names(file) == ["one"]
    assert file.refresh()
    assert names(file) == ["two"]
    assert not file.refresh()


def test_a_wrong_path_fills_no_servers_memory(path, file, tmp_path, caplog):
    """A checkpoint's in the place of the file's, say."""
    with (tmp_path / "other").open("wb") as other:
        other.truncate(1 << 40)
    (tmp_path / "other").rename(path)
    assert not file.refresh()
    assert names(file) == ["one"]
    assert "found more than 64 MiB, expected routes" in caplog.text
    with pytest.raises(DocumentError, match="/dev/zero: found more than 64 MiB"):
        load_routes("/dev/zero")


def test_a_file_that_looks_the_same_is_read_again_while_it_is_new(path):
    """Two changes within a time stamp's resolution, and of the same length."""
    write(path, "one", age_s=0)
    file = WatchedFile(path, parse_routes, "routes")
    status = path.stat()
    path.write_text(path.read_text().replace("one", "two"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.refresh()
    assert names(file) == ["two"]


def test_a_change_is_noticed_whatever_becomes_of_the_time_stamp(path, clock):
    """As by tar and rsync, which set it: a revoked key is as long as the one in its place."""
    clock.ns += 60_000_000_000
    file = WatchedFile(path, parse_routes, "routes")
    before = path.stat()
    path.write_text(path.read_text().replace("one", "two"))
    for _ in range(1000):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if path.stat().st_ctime_ns != before.st_ctime_ns:
            break
        time.sleep(0.001)  # until the file system's clock ticks
    assert path.stat().st_size == before.st_size
    assert file.refresh()
    assert names(file) == ["two"]


def test_a_file_that_is_replaced_through_a_link_is_noticed(tmp_path):
    """As Kubernetes updates a ConfigMap."""
    link = tmp_path / "routes.yaml"
    for name in ("one", "two"):
        write(tmp_path / f"{name}.yaml", name)
    link.symlink_to(tmp_path / "one.yaml")
    file = WatchedFile(link, parse_routes, "routes")
    link.unlink()
    link.symlink_to(tmp_path / "two.yaml")
    assert file.refresh()
    assert names(file) == ["two"]


def test_touching_a_file_changes_nothing(path, file):
    routes = file.value
    os.utime(path, ns=(1, 1))
    assert not file.refresh()
    assert file.value is routes


def test_a_broken_file_leaves_the_routes_and_is_logged_once(path, caplog):
    """Whatever parsing it ends with: nobody who asks in the meantime has that error."""

    def parse(file, text):
        if "overflow" in text:
            raise OverflowError("int too large to convert to float")
        return parse_routes(file, text)

    caplog.set_level(logging.INFO, LOGGER)
    file = WatchedFile(path, parse, "routes")
    for number, (text, message) in enumerate(
        {
            "routes: {one: [": "invalid YAML",
            "routes: {one: 7}": "The routes stay as they were",
            "overflow": "OverflowError",
        }.items(),
        1,
    ):
        path.write_text(text)
        for _ in range(3):
            assert not file.refresh()
        assert names(file) == ["one"]
        assert [record.levelname for record in caplog.records] == ["ERROR"] * number
        assert message in caplog.text
    write(path, "mended", age_s=0)
    assert file.refresh()
    assert names(file) == ["mended"]


@pytest.mark.parametrize("back", ["one", "other"])
def test_a_file_that_is_gone_leaves_the_routes_until_it_is_back(path, file, caplog, back):
    caplog.set_level(logging.ERROR, LOGGER)
    path.unlink()
    for _ in range(3):
        assert not file.refresh()
    assert names(file) == ["one"]
    assert len(caplog.records) == 1
    assert "No such file" in caplog.text
    write(path, back)
    assert file.refresh() == (back != "one")
    assert names(file) == [back]


def test_a_file_is_tried_again_that_could_not_be_read(path, file, clock, monkeypatch):
    """Too many files were open when it changed, say."""
    write(path, "two")
    clock.ns += 60_000_000_000

    def fail(path, mode):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(watched.Path, "open", fail)
        assert not file.refresh()
    assert not file.refresh()
    clock.ns += 6_000_000_000
    assert file.refresh()
    assert names(file) == ["two"]


@pytest.mark.parametrize("later_s", [6, -3600], ids=["later", "clock-put-back"])
def test_a_file_is_tried_again_that_could_not_be_taken(path, clock, caplog, later_s):
    """Its route had the name of an adapter, which has been unloaded since."""
    taken = {"two"}

    def parse(file, text):
        routes = parse_routes(file, text)
        routes.check_names(taken, "an adapter")
        return routes

    file = WatchedFile(path, parse, "routes")
    write(path, "two")
    for _ in range(3):
        clock.ns += 60_000_000_000
        assert not file.refresh()
    assert len(caplog.records) == 1
    taken.clear()
    assert not file.refresh()
    clock.ns += later_s * 1_000_000_000
    assert file.refresh()
    assert names(file) == ["two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"routes: \xff", "byte 0xff at offset 8, expected UTF-8")],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, content, message):
    path = tmp_path / "routes.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DocumentError, match=message):
        load_routes(path)
