"""What the store and the job that reads an adapter say to each other."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from vllm_multilora.failures import FailureKind
from vllm_multilora.store.messages import Contents


class JobMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base class of all messages between the store and a job."""


class Opened(JobMessage, frozen=True):
    """The files are open; answered by `Known` or `Go`.

    Attributes:
        version: Tells files from others; empty: nothing does.
    """

    version: str


class Checked(JobMessage, frozen=True):
    """Config and header are right; answered by `Place` or `CheckOnly`.

    Attributes:
        contents: What was found.
        block_bytes: int64 [n], bytes of each block, as they lie in memory.
    """

    contents: Contents
    block_bytes: bytes


class Done(JobMessage, frozen=True):
    """All bytes are read, checked, and packed where there was room.

    Attributes:
        digest: As of `PackInfo`; so are the others.
    """

    digest: str
    nbytes: int
    parts: tuple[str, ...]


class JobFailed(JobMessage, frozen=True):
    """The adapter cannot be had."""

    kind: FailureKind
    message: str
    problems: list[dict[str, Any]]


class Known(JobMessage, frozen=True):
    """These files are in memory, or another job reads them: nothing more to do."""


class Go(JobMessage, frozen=True):
    """The files are to be checked."""


class Place(JobMessage, frozen=True):
    """Where to pack to; the segments' descriptors come with it.

    Attributes:
        places: int64 [n], each block's place, as they lie in memory.
        extents: Of each extent the index of its segment, its first byte, its bytes.
    """

    places: bytes
    extents: list[tuple[int, int, int]]


class CheckOnly(JobMessage, frozen=True):
    """There is no room: the bytes are to be read and checked, and not packed."""


FromJob: TypeAlias = Opened | Checked | Done | JobFailed
ToJob: TypeAlias = Known | Go | Place | CheckOnly
