"""The arena's segments: anonymous memory files, mapped by those who get their descriptor."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import tempfile
from pathlib import Path

from vllm_multilora.store.memory.syscalls import libc

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # of fallocate(2)


class SharedSegments:
    """Segments by their numbers."""

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}
        self._pinned: set[int] = set()

    def create(self, number: int, size: int) -> None:
        """Makes a segment; raises OSError."""
        descriptor = _anonymous_file(f"multilora-{number}")
        try:
            os.ftruncate(descriptor, size)
            _fix_size(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptors[number] = descriptor

    def close(self, number: int) -> None:
        os.close(self._descriptors.pop(number))
        self._pinned.discard(number)

    def give_back(self, number: int, offset: int, size: int) -> None:
        """Gives the pages of a range back to the system; they read as zeros afterwards."""
        if number in self._pinned:
            return
        # Where the system cannot do it (ENOTSUP), the pages stay, free, in the segment.
        libc.fallocate(
            self._descriptors[number],
            _KEEP_SIZE | _PUNCH_HOLE,
            ctypes.c_int64(offset),
            ctypes.c_int64(size),
        )

    @property
    def numbers(self) -> set[int]:
        return set(self._descriptors)

    def size(self, number: int) -> int:
        """Bytes of a segment; 0 if there is none of this number."""
        descriptor = self._descriptors.get(number)
        return 0 if descriptor is None else os.fstat(descriptor).st_size

    def descriptor(self, number: int) -> int:
        """The descriptor that can be written to; this object keeps it."""
        return self._descriptors[number]

    def open(self, number: int, *, pinned: bool) -> int:
        """A new descriptor for somebody who reads.

        One that a device pins can be written to as well. It goes on reading the pages that it has
        pinned, so that those of this segment are never given back singly any more.
        """
        mode = os.O_RDWR if pinned else os.O_RDONLY
        path = f"/proc/self/fd/{self._descriptors[number]}"
        descriptor = os.open(path, mode | os.O_CLOEXEC)
        if pinned:
            self._pinned.add(number)
        return descriptor

    def close_all(self) -> None:
        for number in list(self._descriptors):
            self.close(number)


def _anonymous_file(name: str) -> int:
    """A file that is in memory and in no folder."""
    with contextlib.suppress(OSError, AttributeError):  # a kernel, sandbox or Python without it
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
    descriptor, path = tempfile.mkstemp(prefix=name, dir=folder)
    Path(path).unlink()
    return descriptor


def _fix_size(descriptor: int) -> None:
    """Nobody changes a segment's size, though jobs may write to it.

    A process that reads what is mapped and not there any more is killed, the model's workers too.
    """
    if hasattr(fcntl, "F_ADD_SEALS"):
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        # A file of a folder has no seals; jobs cannot cut that one off where there is seccomp.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
