"""Where stores are found: nowhere that another user could have a hand in."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.store.fake_reader import FakeReader
from vllm_multilora.store.jobs.runner import ThreadRunner
from vllm_multilora.store.memory.segments import SharedSegments
from vllm_multilora.store.protocol import store_folder
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE, StoreUnavailableError
from vllm_multilora.store.server import StoreServer


@pytest.fixture
def usual(monkeypatch):
    """The place that is taken when nothing is named; it does not exist yet."""
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 bytes
        monkeypatch.delenv(FOLDER_VARIABLE)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short) / f"vllm-multilora-{os.geteuid()}"


def test_the_folder_is_made_for_this_user_alone(usual):
    assert store_folder.store_folder() == usual
    assert usual.stat().st_mode & 0o777 == 0o700


def test_the_folder_for_the_session_is_preferred(usual, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(usual.parent))
    assert store_folder.store_folder() == usual.parent / "vllm-multilora"


@pytest.mark.parametrize("session", ["nowhere", "another-users"])
def test_without_a_folder_for_the_session_all_processes_of_the_user_share_the_usual_one(
    usual, monkeypatch, session
):
    """As after `su`, which leaves the variable as it was."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(usual.parent / session))
    if session == "another-users":
        (usual.parent / session / "vllm-multilora").mkdir(parents=True)
        (usual.parent / session / "vllm-multilora").chmod(0o755)  # root may write to any folder
    for _ in range(2):
        monkeypatch.setenv(FOLDER_VARIABLE, "")
        assert store_folder.store_folder() == usual


@pytest.mark.parametrize("is_usable", [True, False])
def test_where_a_socket_has_no_room_in_the_temporary_folder_it_is_in_the_machines(
    usual, monkeypatch, is_usable
):
    """vLLM's own sockets have shorter names."""
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    monkeypatch.setattr(store_folder, "_MACHINES", str(usual.parent))
    monkeypatch.setattr(tempfile, "tempdir", str(usual.parent / ("x" * 70)))
    if not is_usable:
        usual.touch()
    found = store_folder.store_folder()
    assert (found == usual) == is_usable
    with store_folder.listen(store_folder.socket_path(found)):
        assert found.parent == usual.parent


def test_without_a_temporary_folder_the_error_says_what_to_name(usual, monkeypatch):
    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(StoreUnavailableError, match=f"No usable.*{FOLDER_VARIABLE}"):
        store_folder.store_folder()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(usual.parent))
    assert store_folder.store_folder() == usual.parent / "vllm-multilora"


def test_who_sees_other_files_looks_for_another_store(tmp_path):
    """As containers that share a folder: what a path leads to in one is not there in the other."""
    code = """
import ctypes, os, sys
from pathlib import Path
from vllm_multilora.store.protocol.store_folder import socket_path
before = socket_path(Path("/shared"))
if os.geteuid() != 0:
    ctypes.CDLL(None).unshare(0x10000000)  # CLONE_NEWUSER, where one may change one's root
try:
    os.chroot(sys.argv[1])
except PermissionError:
    sys.exit(77)
print(before, socket_path(Path("/shared")))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("no user namespaces here")
    before, after = done.stdout.split()
    assert before == str(store_folder.socket_path(Path("/shared")))
    assert after != before


def test_machines_that_share_a_folder_leave_each_other_s_sockets_alone(tmp_path, monkeypatch):
    """A store on another machine looks dead from here."""
    other = store_folder.socket_path(tmp_path)
    store_folder.listen(other).close()
    seen = os.open(other, os.O_PATH)
    monkeypatch.setattr(store_folder, "kernel", lambda: "this machine's")
    with store_folder.listen(store_folder.socket_path(tmp_path)):
        assert os.fstat(seen).st_nlink == 1
    os.close(seen)


def test_nobody_waits_for_ever_for_a_process_that_is_frozen_with_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(store_folder, "_LOCK_S", 0.1)
    refusals: list[str] = []

    def wait() -> None:
        try:
            with store_folder.locked(tmp_path):
                pass
        except StoreUnavailableError as error:
            refusals.append(str(error))

    with store_folder.locked(tmp_path):
        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        waiting.join(30)
    [refusal] = refusals
    assert refusal.startswith(f"{tmp_path}/lock: another process has held this lock for 0.1")
    with store_folder.locked(tmp_path):
        pass


def _link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    "prepare",
    [_link, lambda path: path.mkdir(mode=0o777), lambda path: path.touch(mode=0o700)],
    ids=["link", "open-to-others", "file"],
)
def test_a_folder_that_cannot_be_trusted_is_left_alone(usual, prepare, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    prepare(usual)
    if usual.is_dir() and not usual.is_symlink():
        usual.chmod(0o777)
    private = store_folder.store_folder()
    assert private != usual
    assert private.stat().st_mode & 0o777 == 0o700
    assert store_folder.store_folder() == private, "what this process starts finds it too"


def test_a_foreign_folder_is_left_alone(usual, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    usual.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(usual.parent))
    usual.rename(usual.parent / "vllm-multilora-12345")
    assert store_folder.store_folder() != usual.parent / "vllm-multilora-12345"


def test_a_named_folder_that_cannot_be_used_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "open"))
    with pytest.raises(StoreUnavailableError, match="mode 755"):
        store_folder.store_folder()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / ("x" * 120)))
    with pytest.raises(StoreUnavailableError, match="too long"):
        store_folder.store_folder()


def test_a_named_folder_is_the_same_one_when_the_process_works_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, "named")
    store_folder.store_folder()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store_folder.store_folder() == tmp_path / "named"


def test_the_socket_of_a_dead_store_is_replaced_and_a_living_one_is_not(tmp_path):
    path = tmp_path / "s.sock"
    store_folder.listen(path).close()
    with store_folder.listen(path), pytest.raises(StoreUnavailableError, match="in use"):
        store_folder.listen(path)


@pytest.mark.parametrize("was_there", [True, False], ids=["renamed since", "removed before"])
def test_a_store_removes_its_own_socket_only(tmp_path, was_there):
    path = tmp_path / "s.sock"
    with store_folder.listen(path) as first:
        if not was_there:
            path.unlink()
        address = store_folder.StoreAddress.of(first)
        if was_there:
            path.rename(tmp_path / "old.sock")
        with store_folder.listen(path):
            address.close()
            assert path.exists()


def test_a_store_that_ends_leaves_its_place_before_it_frees_its_memory(tmp_path, monkeypatch):
    """Freeing much takes long, and file systems use inodes' numbers again."""
    path = tmp_path / "s.sock"
    successors = []
    monkeypatch.setattr(SharedSegments, "close_all", lambda _: successors.append(listen(path)))

    def listen(path: Path) -> socket.socket:
        assert not path.exists()
        return store_folder.listen(path)

    server = StoreServer(store_folder.listen(path), ThreadRunner(), FakeReader())
    server.stop()
    server.run()
    with successors[0]:
        store_folder.connect(path).close()
