"""From an exception to the kind of failure that a tenant and the metrics are told."""

import errno

import pytest

from vllm_multilora.adapters.errors import AdapterFormatError, AdapterReadError
from vllm_multilora.cache.load_failures import FailureKind, classify_failure, describe_failure


def caused_by(error, *causes):
    """The error, raised from the first cause, that from the next, and so on."""
    above = error
    for cause in causes:
        above.__cause__ = cause
        above = cause
    return error


class DeclaredError(RuntimeError):
    failure_kind = FailureKind.GONE


class MisdeclaredError(RuntimeError):
    failure_kind = "gone"


KINDS = {
    "no file": (FileNotFoundError("x"), FailureKind.GONE),
    "a file in place of a folder": (NotADirectoryError("x"), FailureKind.GONE),
    "no permission": (PermissionError("x"), FailureKind.UNREADABLE),
    "input/output error": (OSError(errno.EIO, "x"), FailureKind.UNREADABLE),
    "stale network handle": (OSError(errno.ESTALE, "x"), FailureKind.UNREADABLE),
    "the storage timed out": (OSError(errno.ETIMEDOUT, "x"), FailureKind.TIMEOUT),
    "no memory": (MemoryError(), FailureKind.NO_MEMORY),
    "no memory to map": (OSError(errno.ENOMEM, "x"), FailureKind.NO_MEMORY),
    "not valid": (ValueError("x"), FailureKind.INVALID),
    "adapter not valid": (AdapterFormatError("x"), FailureKind.INVALID),
    "adapter not readable": (AdapterReadError("x"), FailureKind.UNREADABLE),
    "adapter not there": (
        caused_by(AdapterReadError("x"), FileNotFoundError("y")),
        FailureKind.GONE,
    ),
    "adapter not mapped, two causes deep": (
        caused_by(AdapterReadError("x"), OSError("y"), OSError(errno.ENOMEM, "z")),
        FailureKind.NO_MEMORY,
    ),
    "format error from a missing file": (
        caused_by(AdapterFormatError("x"), FileNotFoundError("y")),
        FailureKind.INVALID,
    ),
    "a bug": (KeyError("x"), FailureKind.INTERNAL),
    "an exit": (SystemExit(1), FailureKind.INTERNAL),
    "declares itself": (DeclaredError("x"), FailureKind.GONE),
    "declares nonsense": (MisdeclaredError("x"), FailureKind.INTERNAL),
}


@pytest.mark.parametrize("case", KINDS)
def test_an_exception_has_a_kind(case):
    error, kind = KINDS[case]
    assert classify_failure(error) is kind


def test_causes_that_go_in_a_circle_end():
    first, second = OSError("a"), OSError("b")
    first.__cause__, second.__cause__ = second, first
    assert classify_failure(first) is FailureKind.UNREADABLE


def test_an_error_is_described_even_if_it_cannot_describe_itself():
    class MuteError(Exception):
        def __str__(self):
            raise RuntimeError("no")

    assert describe_failure(ValueError("rank 9 of 8")) == "rank 9 of 8"
    assert describe_failure(MemoryError()) == "MemoryError"
    assert describe_failure(MuteError()) == "MuteError"
