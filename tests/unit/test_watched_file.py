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


def test_a_changed_file_is_read_again(path):
    file = WatchedFile(path, parse_routes, "routes")
    assert not file.refresh()
    write(path, "two", age_s=50)
    assert names(file) == ["one"]
    assert file.refresh()
    assert names(file) == ["two"]
    assert not file.refresh()


def test_a_wrong_path_fills_no_servers_memory(path, tmp_path, caplog):
    """A checkpoint's in the place of the file's, say."""
    file = WatchedFile(path, parse_routes, "routes")
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


def test_touching_a_file_changes_nothing(path):
    file = WatchedFile(path, parse_routes, "routes")
    routes = file.value
    os.utime(path, ns=(1, 1))
    assert not file.refresh()
    assert file.value is routes


def test_a_broken_file_leaves_the_routes_and_is_logged_once(path, caplog):
    caplog.set_level(logging.INFO, LOGGER)
    file = WatchedFile(path, parse_routes, "routes")
    path.write_text("routes: {one: [")
    for _ in range(3):
        assert not file.refresh()
    assert names(file) == ["one"]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "invalid YAML" in caplog.text
    path.write_text("routes: {one: 7}")
    assert not file.refresh()
    assert len(caplog.records) == 2
    write(path, "mended", age_s=0)
    assert file.refresh()
    assert names(file) == ["mended"]


def test_whatever_parsing_ends_with_leaves_the_value_and_is_logged_once(path, caplog):
    """Nobody who asks in the meantime has an error of a file that has changed."""

    def parse(file, text):
        if "two" in text:
            raise OverflowError("int too large to convert to float")
        return parse_routes(file, text)

    file = WatchedFile(path, parse, "routes")
    write(path, "two", age_s=0)
    for _ in range(3):
        assert not file.refresh()
    assert names(file) == ["one"]
    assert len(caplog.records) == 1
    assert "The routes stay as they were" in caplog.text
    assert "OverflowError" in caplog.text
    write(path, "three", age_s=0)
    assert file.refresh()
    assert names(file) == ["three"]


@pytest.mark.parametrize("back", ["one", "other"])
def test_a_file_that_is_gone_leaves_the_routes_until_it_is_back(path, caplog, back):
    caplog.set_level(logging.ERROR, LOGGER)
    file = WatchedFile(path, parse_routes, "routes")
    path.unlink()
    for _ in range(3):
        assert not file.refresh()
    assert names(file) == ["one"]
    assert len(caplog.records) == 1
    assert "No such file" in caplog.text
    write(path, back)
    assert file.refresh() == (back != "one")
    assert names(file) == [back]


def test_a_file_is_tried_again_that_could_not_be_read(path, clock, monkeypatch):
    """Too many files were open when it changed, say."""
    file = WatchedFile(path, parse_routes, "routes")
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


def test_routes_that_the_server_cannot_take_are_refused(path):
    def parse(file, text):
        routes = parse_routes(file, text)
        routes.check_names({"taken"}, "an adapter")
        return routes

    file = WatchedFile(path, parse, "routes")
    write(path, "taken", age_s=30)
    assert not file.refresh()
    assert names(file) == ["one"]
    with pytest.raises(DocumentError, match="an adapter"):
        WatchedFile(path, parse, "routes")


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
