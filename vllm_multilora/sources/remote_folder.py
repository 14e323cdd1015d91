"""What each kind of source has to offer: the files of a folder with their versions, and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

READ_S = 20.0
"""Seconds that a source may take to answer, or to send more."""

CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class RemoteFile:
    """A file as its source lists it.

    Attributes:
        version: ETag, version id, commit, or time of the last change: another content has another.
    """

    name: str
    size: int
    version: str


class RemoteFolder(Protocol):
    """A folder of a source."""

    def files(self, names: Sequence[str]) -> list[RemoteFile]:
        """The named files, without those that are missing; raises `SourceError`."""

    def read(self, file: RemoteFile, begin: int) -> Iterator[bytes]:
        """Its bytes from one on; ends early where the source does; raises `SourceError`."""
