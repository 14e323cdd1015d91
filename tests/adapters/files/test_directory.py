"""Directories of adapters: what counts as one, what counts as a change."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from vllm_multilora.adapters.directory import (
    FIRST_NUMBER,
    AdapterDirectories,
    AdapterVersion,
    Settling,
    is_adapter_name,
    require_directories,
)
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots
from vllm_multilora.errors import ConfigError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def put(folder: Path, *, config: str = "{}", tensors: str | None = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config)
    if tensors is not None:
        (folder / TENSORS).write_text(tensors)
    return folder


def looking_at(*directories: Path, roots: tuple[Path, ...] = ()) -> AdapterDirectories:
    names = [str(directory) for directory in directories]
    return AdapterDirectories(names, AllowedRoots(roots, names))


def test_every_sub_folder_with_a_configuration_is_an_adapter(tmp_path):
    for name in ("acme", "globex", "mit Leerzeichen", "日本"):
        put(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights-only").mkdir()
    (tmp_path / "weights-only" / TENSORS).write_text("")
    put(tmp_path / "deeper" / "nested")
    put(tmp_path / ".acme.partial")
    directories = looking_at(tmp_path)
    found = directories.scan()
    assert directories.find("acme") == found["acme"]
    assert list(found) == ["acme", "globex", "mit Leerzeichen", "日本"]
    assert found["acme"].path == str(tmp_path / "acme")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "../acme",
        "a/b",
        "/etc",
        "a\nb",
        "a\0b",
        "a\x1b[2J",
        "\udc80",
        "a" * 256,
        "ä" * 128,
        "a" * 100_000,
    ],
    ids=lambda name: ascii(name)[:24],
)
def test_no_other_name_is_looked_for(tmp_path, name):
    put(tmp_path / "inside" / "acme")
    put(tmp_path / "acme")
    assert not is_adapter_name(name)
    assert looking_at(tmp_path / "inside").find(name) is None


def test_links_serve_as_long_as_they_stay_inside(tmp_path):
    directory, outside = tmp_path / "adapters", tmp_path / "elsewhere"
    put(directory / "acme-v2")
    put(outside / "secret")
    (directory / "acme").symlink_to("acme-v2")
    (directory / "secret").symlink_to(outside / "secret")
    (directory / "all").symlink_to(directory)
    (directory / "loop").symlink_to("loop")
    directories = looking_at(directory)
    assert list(directories.scan()) == ["acme", "acme-v2"]
    assert directories.find("secret") is None
    assert list(looking_at(directory, roots=(outside,)).scan()) == ["acme", "acme-v2", "secret"]


def test_of_two_folders_of_one_name_the_first_directory_s_counts(tmp_path, caplog):
    put(tmp_path / "b" / "acme")
    put(tmp_path / "a" / "acme")
    put(tmp_path / "a" / "globex")
    directories = looking_at(tmp_path / "b", tmp_path / "a")
    for _ in range(2):
        found = directories.scan()
    assert found["acme"].path == str(tmp_path / "b" / "acme")
    assert found["globex"].path == str(tmp_path / "a" / "globex")
    assert directories.find("acme") == found["acme"]
    assert caplog.text.count("a/acme is not served") == 1


def test_a_version_has_one_number_whoever_looks(tmp_path):
    put(tmp_path / "acme")
    number = looking_at(tmp_path).scan()["acme"].number
    assert number == looking_at(tmp_path / "acme" / "..").find("acme").number
    assert FIRST_NUMBER <= number < 2**53


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
@pytest.mark.parametrize("change", ["longer", "touched", "replaced"])
def test_another_version_has_another_number(tmp_path, file, change):
    put(tmp_path / "acme")
    directories = looking_at(tmp_path)
    before = directories.find("acme").number
    path = tmp_path / "acme" / file
    status = path.stat()
    if change == "longer":
        path.write_text(path.read_text() + "more")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "touched":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:  # by a file of the same size and time, as unpacking an archive leaves it
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes())
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(path)
    assert directories.find("acme").number != before


def test_what_cannot_be_read_for_a_while_stays(tmp_path, caplog, monkeypatch):
    directory = tmp_path / "adapters"
    put(directory / "acme")
    directories = looking_at(directory)
    before = directories.scan()
    directory.rename(tmp_path / "unmounted")
    assert directories.scan() == before
    (tmp_path / "unmounted").rename(directory)

    def fail(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        assert directories.scan() == before
    assert "cannot be read" in caplog.text


def test_what_is_wrong_is_reported_once_a_day_and_another_day_whatever_came_before(
    tmp_path, caplog
):
    now = 0.0
    directories = AdapterDirectories([str(tmp_path)], AllowedRoots((), []), lambda: now)
    for number in range(5_000):
        now += 1.0
        directories.tell("acme is refused")
        directories.tell(f"a stranger's {number}")
    assert caplog.text.count("acme is refused") == 1
    assert 500 < caplog.text.count("a stranger's") < 2_000
    caplog.clear()
    now += 86_400.0
    for _ in range(2):
        directories.tell("acme is refused")
        directories.tell("globex is refused")
    assert [record.args for record in caplog.records] == [
        ("acme is refused",),
        ("globex is refused",),
    ]


def test_new_adapters_count_at_once(tmp_path):
    directories, settling = looking_at(tmp_path), Settling()
    assert settling.settle(directories.scan()) == {}
    put(tmp_path / "acme")
    assert list(settling.settle(directories.scan())) == ["acme"]


def test_a_folder_that_is_being_written_keeps_its_version_until_it_rests(tmp_path):
    put(tmp_path / "acme", tensors="old")
    directories, settling = looking_at(tmp_path), Settling()
    old = settling.settle(directories.scan())["acme"]
    (tmp_path / "acme" / TENSORS).unlink()
    assert settling.settle(directories.scan())["acme"] == old
    for size in range(1, 4):
        put(tmp_path / "acme", tensors=size * "new")
        assert settling.settle(directories.scan())["acme"] == old
    new = settling.settle(directories.scan())["acme"]
    assert new == directories.find("acme") != old


def test_a_folder_that_is_taken_away_and_put_back_was_never_gone(tmp_path):
    put(tmp_path / "acme")
    directories, settling = looking_at(tmp_path), Settling()
    before = settling.settle(directories.scan())
    (tmp_path / "acme").rename(tmp_path / ".acme")
    assert settling.settle(directories.scan()) == before
    (tmp_path / ".acme").rename(tmp_path / "acme")
    assert settling.settle(directories.scan()) == before
    (tmp_path / "acme").rename(tmp_path / ".acme")
    assert settling.settle(directories.scan()) == before
    assert settling.settle(directories.scan()) == {}


def test_a_server_does_not_start_with_a_directory_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    require_directories([str(tmp_path)])
    for name in ("nowhere", "file"):
        folder = str(tmp_path / name)
        with pytest.raises(ConfigError, match=f"^--multilora-adapter-dir names '{folder}', .*dir"):
            require_directories([folder])


def test_looking_at_thousands_of_folders_is_cheap(tmp_path):
    for number in range(2_000):
        put(tmp_path / f"customer-{number}")
    directories, settling = looking_at(tmp_path), Settling()
    settling.settle(directories.scan())
    took = []
    for _ in range(5):
        began = time.process_time()
        assert len(settling.settle(directories.scan())) == 2_000
        took.append(time.process_time() - began)
    assert min(took) < 0.5


def test_folders_beyond_the_limit_are_not_served_by_name_either(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("vllm_multilora.adapters.directory.MAX_FOLDERS", 2)
    for name in ("acme", "beta", "corp"):
        put(tmp_path / name)
    directories = looking_at(tmp_path)
    for _ in range(2):
        served = directories.scan()
        assert len(served) == 2
        (other,) = {"acme", "beta", "corp"} - served.keys()
        assert directories.find(other) is None
        assert all(directories.find(name) == served[name] for name in served)
    assert caplog.text.count("has more than 2 entries; not all are served") == 1
    shutil.rmtree(tmp_path / next(iter(served)))
    assert other in directories.scan()
    assert directories.find(other) is not None


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "👍", "acme"])
def test_any_other_name_is_looked_for(tmp_path, name):
    directories = looking_at(tmp_path)
    assert directories.find(name) is None
    put(tmp_path / name)
    assert directories.find(name) is not None


def test_a_name_that_the_file_system_cannot_hold_is_no_adapter(tmp_path, monkeypatch, caplog):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENAMETOOLONG, "File name too long")

    directories = looking_at(tmp_path)
    with monkeypatch.context() as patch:  # as one that encrypts names, and has shorter ones
        patch.setattr(os, "stat", fail)
        assert directories.find("a" * 200) is None
    assert not caplog.records


def test_no_two_folders_have_one_number(tmp_path, caplog, monkeypatch):
    """Who may write to a directory can look for facts that give another adapter's number."""
    put(tmp_path / "beta")
    directories = looking_at(tmp_path)
    numbers = {"beta": FIRST_NUMBER, "acme": FIRST_NUMBER, "corp": FIRST_NUMBER + 1}
    monkeypatch.setattr(AdapterVersion, "number", property(lambda folder: numbers[folder.name]))
    assert list(directories.scan()) == ["beta"]
    for name in ("acme", "corp"):
        put(tmp_path / name)
    for _ in range(3):
        assert set(directories.scan()) == {"beta", "corp"}
        assert directories.find("acme") is None
    assert caplog.text.count("acme is not served") == 1
    numbers["acme"] += 7  # another version of it
    assert set(directories.scan()) == {"acme", "beta", "corp"}
    numbers["acme"] -= 7
    assert directories.find("acme") is None
