"""Why an adapter could not be loaded, as a value that can be sent across threads and processes."""

from __future__ import annotations

import enum
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class FailureKind(enum.Enum):
    """What kind of thing went wrong; the values are labels and messages.

    Attributes:
        GONE: The files are not there.
        INVALID: The files are there and cannot be served; trying again does not help.
        UNREADABLE: The storage gave an error; a later try may succeed.
        NO_MEMORY: There was no memory for the adapter.
        TIMEOUT: The load did not end in time.
        QUARANTINED: Its numbers were not finite in use.
        CONFLICT: Another version was served than its caller expected.
        INTERNAL: Anything else; a fault of the software.
    """

    GONE = "gone"
    INVALID = "invalid"
    UNREADABLE = "unreadable"
    NO_MEMORY = "no_memory"
    TIMEOUT = "timeout"
    QUARANTINED = "quarantined"
    CONFLICT = "conflict"
    INTERNAL = "internal"


@dataclass(frozen=True)
class LoadFailure:
    """One adapter that could not be had.

    It holds text and not the exception: an exception keeps alive the frames that it went through,
    and with them the buffers of a half-loaded adapter. It is for the tenant whose requests fail.
    """

    kind: FailureKind
    message: str


def unexpected(version: Any, expected: str | None) -> str:
    """Why what follows another version must not replace one with a digest; empty if it may."""
    found = "none" if version is None else version.digest
    is_expected = not expected or found.startswith(expected)
    return "" if is_expected else f"found version {found}, expected {expected}: load its successor"


class RequestFailure(LoadFailure):
    """A request cannot be served, and others with its adapter can, as before."""


def classify_failure(error: BaseException) -> FailureKind:
    """The kind of failure that an exception of a load stands for.

    An exception may say so itself with an attribute `failure_kind`. Otherwise its type and, for
    errors of the operating system, the errors that caused it decide.
    """
    declared = getattr(error, "failure_kind", None)
    if isinstance(declared, FailureKind):
        return declared
    if isinstance(error, MemoryError):
        return FailureKind.NO_MEMORY
    if isinstance(error, OSError):
        return _classify_os_error(error)
    if isinstance(error, ValueError):
        return FailureKind.INVALID
    return FailureKind.INTERNAL


def describe_failure(error: BaseException) -> str:
    """An exception's message; its type's name where it has none or cannot give it."""
    try:
        message = str(error)
    except Exception:
        message = ""
    return message or type(error).__name__


def _classify_os_error(error: OSError) -> FailureKind:
    for cause in _causes(error):
        if isinstance(cause, FileNotFoundError | NotADirectoryError):
            return FailureKind.GONE
        if isinstance(cause, MemoryError):
            return FailureKind.NO_MEMORY
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return FailureKind.NO_MEMORY
        if isinstance(cause, TimeoutError):
            return FailureKind.TIMEOUT
    return FailureKind.UNREADABLE


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, what that was raised from, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__
