"""A fingerprint that tells one state of a file from another."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Fingerprint:
    """What tells one state of a file from another.

    Attributes:
        device: The number of its file system.
        inode: The file's number there.
        size: Bytes.
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
        """The fingerprint in the result of `os.stat` or `os.fstat`."""
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
