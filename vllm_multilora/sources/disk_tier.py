"""Fetched adapters on disk: one folder for each version of an adapter, within a limit of bytes.

    DIR/lock                    held while room is made, and while a folder is published
    DIR/entries/KEY-BYTES/      a whole adapter in `adapter/`, and the file `lease`
    DIR/incoming/KEY-BYTES-BOOT/    one that is being fetched, or was when its process ended

A key stands for a source and one version of its files, so that an entry never changes. All that
share a folder, of whatever server, take its lock, and count what others have begun with its whole
size: together they stay below the limit. Whoever uses an entry holds a lock on its `lease`, whose
time is that of its last use. What is read goes on being read even where such locks do nothing: the
files of an entry are only ever unlinked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.source_errors import SourceError, unusable

ADAPTER, LEASE = "adapter", "lease"

_LOOK_S = 0.05
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Kept(NamedTuple):
    used: float
    nbytes: int
    folder: Path


class Incoming(NamedTuple):
    """A folder that an adapter is fetched into, and the descriptor that holds its lock."""

    folder: Path
    lease: int


class DiskTier:
    """The adapters in a folder; several processes may have one on the same folder.

    Args:
        folder: Made if it is not there; nobody else can look into it then.
        most_bytes: Bytes of all files, those included that are being fetched.
    """

    def __init__(self, folder: str | Path, most_bytes: int) -> None:
        self.folder = Path(folder)
        self._most_bytes = most_bytes
        self._entries, self._incoming = self.folder / "entries", self.folder / "incoming"
        # What a machine that went down had not written yet may have holes: it is not resumed.
        self._boot = _BOOT_ID.read_text()[:8] if _BOOT_ID.exists() else "0"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for each in (self._entries, self._incoming):
            each.mkdir(mode=0o700, exist_ok=True)

    def find(self, key: str, nbytes: int) -> Path | None:
        """The folder of an adapter that is there, whose time of use is now."""
        entry = self._entries / f"{key}-{nbytes}"
        try:
            os.utime(entry / LEASE)
        except FileNotFoundError:
            return None
        return entry / ADAPTER

    @contextmanager
    def fetching(self, key: str, nbytes: int, wait_s: float) -> Iterator[Incoming | None]:
        """A folder to fetch an adapter into, with what an earlier attempt has left there.

        Room is made for it. None: another process has fetched it meanwhile, so that `find` has it;
        waits so long for one that is about to. The folder stays where it is not `publish`ed.

        Raises:
            SourceError: There is no room.
            OSError: The disk failed.
        """
        folder = self._incoming / f"{key}-{nbytes}-{self._boot}"
        deadline = time.monotonic() + wait_s
        while (lease := self._begin(folder, key, nbytes)) is None:
            if self.find(key, nbytes) is not None:
                yield None
                return
            if time.monotonic() >= deadline:
                found = f"being fetched by another process, and not whole within {wait_s:g} s"
                raise unusable(str(folder), found, "an adapter", kind=FailureKind.TIMEOUT)
            time.sleep(_LOOK_S)
        try:
            yield Incoming(folder / ADAPTER, lease)
        finally:
            os.close(lease)

    def publish(self, incoming: Incoming, key: str, nbytes: int) -> Path:
        """Makes a whole adapter an entry, which all may use; its files are on the disk by then."""
        _sync(incoming.folder)
        entry = self._entries / f"{key}-{nbytes}"
        with self._locked():
            if entry.exists():
                shutil.rmtree(incoming.folder.parent)
            else:
                fcntl.flock(incoming.lease, fcntl.LOCK_SH)  # of the same file as the entry's
                incoming.folder.parent.rename(entry)
                _sync(self._entries)
        return entry / ADAPTER

    def _begin(self, folder: Path, key: str, nbytes: int) -> int | None:
        """Makes room, and takes the lease of a folder; None: somebody has it, or it is whole."""
        with self._locked():
            if self.find(key, nbytes) is not None:
                return None
            if not folder.exists():
                self._make_room(nbytes)
                (folder / ADAPTER).mkdir(mode=0o700, parents=True)
            lease = os.open(folder / LEASE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if _has_lock(lease, fcntl.LOCK_EX):
                os.utime(lease)
                return lease
            os.close(lease)
            return None

    def _make_room(self, nbytes: int) -> None:
        """Removes what was used longest ago, until there is room for so many bytes more."""
        kept = sorted(self._kept())
        used = sum(one.nbytes for one in kept)
        for one in kept:
            if used + nbytes <= self._most_bytes and self._free() >= nbytes:
                return
            if _remove(one.folder):
                used -= one.nbytes
        if used + nbytes > self._most_bytes:
            raise self._full(
                nbytes,
                f"{self._most_bytes - used} of {self._most_bytes} bytes left for it: the others "
                "are in use",
                "raise --multilora-disk-cache-gib",
            )
        if (free := self._free()) < nbytes:
            raise self._full(nbytes, f"{free} bytes free on its disk", "free some")

    def _full(self, nbytes: int, found: str, hint: str) -> SourceError:
        cache, expected = "the disk cache (--multilora-disk-cache)", f"{nbytes} for the adapter"
        return unusable(cache, found, expected, hint, verb="has", kind=FailureKind.NO_MEMORY)

    def _kept(self) -> Iterator[_Kept]:
        for folder in (*self._entries.iterdir(), *self._incoming.iterdir()):
            with suppress(OSError, ValueError, IndexError):
                nbytes = int(folder.name.split("-")[1])
                lease = folder / LEASE
                used = (lease if lease.exists() else folder).stat().st_mtime
                yield _Kept(used, nbytes, folder)

    def _free(self) -> int:
        disk = os.statvfs(self.folder)
        return disk.f_bavail * disk.f_frsize

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def lease_of(adapter: str | Path) -> int | None:
    """A descriptor that keeps an entry from being removed until it is closed; None: it has gone."""
    try:
        lease = os.open(Path(adapter).parent / LEASE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    # One that is being removed has lost its file's name first.
    if _has_lock(lease, fcntl.LOCK_SH) and os.fstat(lease).st_nlink and Path(adapter).exists():
        with suppress(OSError):
            os.utime(lease)
        return lease
    os.close(lease)
    return None


def _has_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(folder: Path) -> bool:
    """Removes a folder that nobody has the lease of; whether it has gone."""
    with suppress(FileNotFoundError):
        lease = os.open(folder / LEASE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not _has_lock(lease, fcntl.LOCK_EX):
                return False
            # Its lease goes first: one who comes now sees that it has gone.
            (folder / LEASE).unlink()
        finally:
            os.close(lease)
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
