"""Why an adapter could not be fetched; nothing of a client library's own text is passed on."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Self

from vllm_multilora.adapters.adapter_errors import AdapterError
from vllm_multilora.adapters.problems import Code, Problem
from vllm_multilora.failures import FailureKind

ACCESS_HINT = (
    "give the server's credentials read access to it; they are taken from the environment of the "
    "server, and from the file of --multilora-source-credentials"
)
_PASSING = {408, 425, 429}


class SourceError(AdapterError):
    """An adapter cannot be fetched.

    Client libraries' messages may hold addresses with signatures, or keys: each error has a text of
    this package, with a status at most.

    Attributes:
        failure_kind: What its requests and registrations are answered with.
        is_passing: Whether another attempt may succeed at once.
    """

    failure_kind = FailureKind.GONE
    is_passing = False

    @classmethod
    def at(
        cls,
        code: Code,
        file: str,
        found: str,
        expected: str,
        *,
        where: str = "",
        verb: str = "is",
        hint: str = "",
        kind: FailureKind = FailureKind.GONE,
        is_passing: bool = False,
    ) -> Self:
        """The error of one problem; the arguments are those of `Problem.at`, and its own."""
        error = cls.of(Problem.at(code, file, where, found, expected, verb=verb, hint=hint))
        error.failure_kind, error.is_passing = kind, is_passing
        return error


def of_status(file: str, status: int) -> SourceError:
    """What an answer with a status other than 2xx means for a file."""
    phrase = f"{status} {_phrase(status)}".strip()
    if status in (404, 410):
        return SourceError.at(
            Code.FILE_MISSING, file, f"missing: the source answers {phrase}", "a file"
        )
    if status in (401, 403):
        found, kind = f"refused by its source, which answers {phrase}", FailureKind.INVALID
        expected = "a file that the server may read"
        return SourceError.at(Code.NOT_ALLOWED, file, found, expected, hint=ACCESS_HINT, kind=kind)
    if status in (412, 416):
        return replaced(file)
    passing = status >= 500 or status in _PASSING
    kind = FailureKind.UNREADABLE if passing else FailureKind.INVALID
    found = f"not to be had: the source answers {phrase}"
    return unusable(file, found, "a file", kind=kind, is_passing=passing)


def unusable(file: str, found: str, expected: str, hint: str = "", **more: Any) -> SourceError:
    """A file, or a place for some, cannot be used; the arguments are those of `SourceError.at`."""
    kind = more.pop("kind", FailureKind.UNREADABLE)
    return SourceError.at(Code.FILE_UNREADABLE, file, found, expected, hint=hint, kind=kind, **more)


def unreachable(file: str, found: str, *, is_timeout: bool = False) -> SourceError:
    """The source did not answer, or broke off; worth another attempt."""
    kind = FailureKind.TIMEOUT if is_timeout else FailureKind.UNREADABLE
    return unusable(file, f"not to be had: {found}", "a file", kind=kind, is_passing=True)


def replaced(file: str) -> SourceError:
    """The file is not the one that was listed."""
    found, expected = "replaced while it was fetched", "the version that was listed"
    hint, kind = "load the adapter again", FailureKind.UNREADABLE
    return SourceError.at(
        Code.FILE_CHANGED, file, found, expected, verb="was", hint=hint, kind=kind
    )


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
