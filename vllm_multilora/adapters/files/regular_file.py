"""A regular file of an adapter, open for reading."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from vllm_multilora.adapters.adapter_errors import AdapterReadError
from vllm_multilora.adapters.problems import Code, Problem

_MAX_HOLES = 1000
RENAME_HINT = "write adapters under another name, and rename them into place"


@dataclass(frozen=True)
class Fingerprint:
    """What tells one state of a file from another.

    Attributes:
        mtime_ns: When its content last changed, in nanoseconds; whoever may write it may set it.
        ctime_ns: When anything about it last changed; nobody can set it.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Fingerprint:
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )

    @classmethod
    def at(cls, path: str) -> Fingerprint | None:
        """The fingerprint of what is at a path now; None if nothing is."""
        try:
            return cls.of(os.stat(path))  # noqa: PTH116 (a path of the settings)
        except OSError:
            return None

    def __str__(self) -> str:
        """The facts as one word, for comparing versions."""
        return f"{self.device}.{self.inode}.{self.size}.{self.mtime_ns}.{self.ctime_ns}"


class OpenDescriptor:
    """A file descriptor; a context manager that closes it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Closes it; closing twice is harmless."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class RegularFile(OpenDescriptor):
    """An open file; a context manager that closes it.

    It is read with `pread`, never through a memory map: where a mapped file is truncated by
    someone else, touching the lost pages ends the process with SIGBUS. A file that is replaced
    meanwhile is read on as it was; one that is written to in place is noticed.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor)
        self.path = path
        status = os.fstat(descriptor)
        self.fingerprint = Fingerprint.of(status)
        self._links = status.st_nlink

    def fileno(self) -> int:
        """The descriptor; raises `ValueError` when the file is closed."""
        if self._descriptor < 0:
            raise ValueError(f"{self.path} is closed")
        return self._descriptor

    def read_into(self, target: memoryview, offset: int) -> int:
        """Reads bytes from an offset on; how many, fewer at the end; raises `AdapterReadError`."""
        done = 0
        try:
            while done < len(target):
                count = os.preadv(self.fileno(), [target[done:]], offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            raise AdapterReadError.of(unreadable(self.path, error)) from error
        return done

    def read(self, count: int, offset: int = 0) -> bytearray:
        """So many bytes from an offset on, fewer at the file's end; raises `AdapterReadError`."""
        content = bytearray(count)
        del content[self.read_into(memoryview(content), offset) :]
        return content

    def hole_bytes(self) -> int:
        """About how many bytes are in the file's first thousand holes; 0 where nobody can tell."""
        holes, at, size = 0, 0, self.fingerprint.size
        with suppress(OSError):
            for _ in range(_MAX_HOLES):
                if at >= size:
                    break
                hole = os.lseek(self.fileno(), at, os.SEEK_HOLE)
                at = _next_data(self.fileno(), hole, size)
                holes += at - hole
        return holes

    def require_unchanged(self) -> None:
        """Raises `AdapterReadError` if it was written to since opened: it may be a mixture."""
        status = os.fstat(self.fileno())
        now = Fingerprint.of(status)
        if status.st_nlink < self._links:
            # Another file was renamed into its place. Losing a name counts as a change of the
            # inode, and is none of the content.
            now = replace(now, ctime_ns=self.fingerprint.ctime_ns)
        if now != self.fingerprint:
            raise AdapterReadError.at(
                Code.FILE_CHANGED,
                str(self.path),
                f"written to while it was being read ({self.fingerprint}, then {now})",
                "no change",
                verb="was",
                hint=RENAME_HINT,
            )


def _next_data(descriptor: int, offset: int, size: int) -> int:
    """Where data begins from an offset on; the file's end if there is none."""
    if offset >= size:
        return size
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise


def unreadable(path: Path | str, error: OSError) -> Problem:
    """The problem of a file that the system does not let us read."""
    return Problem.at(
        Code.FILE_UNREADABLE,
        str(path),
        "",
        f"unreadable ({error.strerror})",
        "a file that the server's user may read",
    )


def too_large(path: str, size: int, most: int) -> Problem:
    """The problem of a file of more bytes than any adapter of the base model has."""
    return Problem.at(
        Code.FILE_TOO_LARGE,
        path,
        "",
        f"{size} bytes",
        f"at most {most}, more than the base model's largest adapter needs",
        verb="has",
    )
