"""The folder where a user's stores are found, which no other user can access."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.store.protocol.messages import PROTOCOL

FOLDER_VARIABLE = "MULTILORA_STORE_FOLDER"
"""Names the folder; engines and workers that are started by this process inherit it."""

_LONGEST_PATH = 107  # of a local socket, in bytes
_LOCK_S, _LOCK_PAUSE_S = 30.0, 0.01  # a store takes a second to start
_RANDOM = 6  # digits in the name of a process's own socket
_MACHINES = "/tmp"  # for temporary files, whatever is named for those of this process


class StoreUnavailableError(MultiLoRAError, RuntimeError):
    """There is no store to be had, or it does not serve this client; the message says why."""


def store_folder() -> Path:
    """The folder of this user's stores, which is made where it is missing.

    Where the usual places, the session's and then the temporary one, belong to somebody else or
    cannot be made, this process and those that it starts get a folder of their own.

    Raises:
        StoreUnavailableError: The folder that the environment names cannot be used, or it names
            none and none can be made.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        folder = Path(named).absolute()
        os.environ[FOLDER_VARIABLE] = str(folder)  # also once this process works elsewhere
        ensure(folder)
        return folder
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and _fault(folder := Path(runtime, "vllm-multilora")) is None:
        return folder
    try:
        usual = _temporary_folder()
        if _fault(usual) is None:
            return usual
        private = tempfile.mkdtemp(prefix="vllm-multilora-", dir=usual.parent)
    except OSError as error:
        raise StoreUnavailableError(
            f"no folder for the store can be made: {error}; name one that only this user can "
            f"access in {FOLDER_VARIABLE}"
        ) from error
    os.environ[FOLDER_VARIABLE] = private
    return Path(private)


def ensure(folder: Path) -> None:
    """Makes a folder of stores where it is missing, or removed; raises `StoreUnavailableError`."""
    if (fault := _fault(folder)) is not None:
        raise StoreUnavailableError(
            f"{FOLDER_VARIABLE}: {fault}; name a folder that only this user can access"
        )


def socket_path(folder: Path) -> Path:
    """Where the store of this version listens, for those who see the same files as this process."""
    return folder / f"store-{PROTOCOL}-{view()}.sock"


def view() -> str:
    """Tells those apart who see other files; eight digits.

    A store opens what its clients name. Containers may share a folder of stores, as where they have
    their host's `/tmp`, and machines, as where it is in a home, and not what lies at a path, nor
    whoever listens there: each has a store of its own.
    """
    root = Path("/").stat()
    return f"{zlib.crc32(f'{kernel()} {root.st_dev} {root.st_ino}'.encode()):08x}"


@cache
def kernel() -> str:
    """Tells machines apart; all containers of one machine have the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder's lock: sockets in it are made and removed by one process at a time.

    Raises:
        StoreUnavailableError: Another process has held it all the while: it is frozen.
    """
    path = folder / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_S
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise StoreUnavailableError(
                    f"{path}: another process has held this lock for {_LOCK_S:g} seconds, to start "
                    "or to end a store; lslocks shows which. Have it go on, or end it"
                )
            time.sleep(_LOCK_PAUSE_S)
        yield
    finally:
        os.close(descriptor)


def listen(path: Path) -> socket.socket:
    """A socket that listens at a path, which must not exist, or be of a store that has died."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and _is_dead(path):
            path.unlink()
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise StoreUnavailableError(f"{path}: a store cannot listen here: {error}") from error
    return listener


def own_path(folder: Path, kind: str) -> Path:
    """A path for a socket that others do not look for: they are told; `kind` is one letter."""
    return folder / f"{kind}-{view()}{secrets.token_hex(_RANDOM // 2)}.sock"


def listen_alone(path: Path) -> socket.socket:
    """A socket that listens at an `own_path`, whose folder is made where it is missing.

    Those of its kind are removed that dead processes have left; of those who see the same files:
    others' may live, and take no connection from here.

    Raises:
        OSError: The folder cannot be used.
        StoreUnavailableError: Likewise, or it was locked all the while.
    """
    ensure(path.parent)
    with locked(path.parent):
        for other in path.parent.glob(f"{path.stem[:-_RANDOM]}*.sock"):
            if _is_dead(other):
                other.unlink()
        return listen(path)


def connect(path: str | Path, timeout_s: float = 5.0) -> socket.socket:
    """A connection to the store that listens at a path.

    Raises:
        FileNotFoundError: Nothing is there.
        ConnectionRefusedError: The store has died.
        OSError: It does not take the connection.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


@dataclass(frozen=True)
class StoreAddress:
    """A store's own place in the file system, to be removed when it ends.

    Attributes:
        inode: Of the socket there. Only while the listener is open does it tell this socket from
            another store's: the file system may use the number again.
    """

    path: Path
    inode: int

    @classmethod
    def of(cls, listener: socket.socket) -> StoreAddress:
        path = Path(listener.getsockname())
        try:
            return cls(path, path.lstat().st_ino)
        except OSError:
            return cls(path, 0)  # somebody has removed it

    def close(self) -> None:
        """Leaves the place to another store; to be called before the listener is closed."""
        with contextlib.suppress(OSError, StoreUnavailableError), locked(self.path.parent):
            if self.path.lstat().st_ino == self.inode:
                self.path.unlink()


def _is_dead(path: Path) -> bool:
    try:
        connect(path, timeout_s=0.5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def _temporary_folder() -> Path:
    """Where a user's folder is that is in no session; raises OSError where there is no place.

    Among this process's temporary files, or the machine's where that path is too long.
    """
    name = f"vllm-multilora-{os.geteuid()}"
    usual = Path(tempfile.gettempdir(), name)
    return Path(_MACHINES, name) if _is_too_long(socket_path(usual)) else usual


def _is_too_long(path: Path) -> bool:
    return len(os.fsencode(path)) > _LONGEST_PATH


def _fault(folder: Path) -> str | None:
    """Why a folder cannot be used, after it was made where it was missing; None: it can."""
    if _is_too_long(socket_path(folder)):
        return f"{folder}: the path is too long for a socket in it"
    return fault_of_private(folder)


def fault_of_private(folder: Path) -> str | None:
    """Why a folder is not only this user's, after it was made where it was missing; None: it is."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder}: is not a folder itself"
    if found.st_uid != os.geteuid():
        return f"{folder}: belongs to user {found.st_uid}, expected {os.geteuid()}"
    if found.st_mode & 0o077:
        return f"{folder}: others can get at it (mode {found.st_mode & 0o777:o}), expected 700"
    return None
