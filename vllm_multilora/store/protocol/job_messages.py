"""What the store and the job that reads an adapter say to each other."""

from __future__ import annotations

from typing import Any, TypeAlias

from vllm_multilora.failures import FailureKind
from vllm_multilora.store.protocol.messages import Contents, Message

LONGEST_MESSAGE = 4096
MAX_PROBLEMS = 101  # a hundred, and one that counts the others: see `adapters.problems.bounded`
LONGEST_FIELD = 2000
MAX_CHARACTERS = 65_536


class Opened(Message, frozen=True):
    """The files are open, of a `version`, if it is known: the store ends the job if it knows it."""

    version: str


class Checked(Message, frozen=True):
    """Config and header are right; answered by `Place` or `CheckOnly`.

    Attributes:
        block_bytes: int64 [n], bytes of each block, as they lie in memory.
    """

    contents: Contents
    block_bytes: bytes


class Done(Message, frozen=True):
    """All bytes are read, checked, and packed where there was room; fields as of `PackInfo`."""

    digest: str
    nbytes: int
    parts: tuple[str, ...]


class Failure(Message, frozen=True):
    """Why a load failed: in a job's words, or in the store's own.

    Attributes:
        message: What was found and where, for the tenant whose requests fail.
        problems: What is wrong with the files, each as its fields.
    """

    kind: FailureKind
    message: str
    problems: list[dict[str, Any]]

    def bounded(self) -> Failure:
        """The same in a length that may be kept and sent for every request."""
        problems, left = [], MAX_CHARACTERS
        for problem in self.problems[:MAX_PROBLEMS]:
            reported = {
                _cut(str(key), LONGEST_FIELD): value
                if isinstance(value, int)
                else _cut(str(value), LONGEST_FIELD)
                for key, value in problem.items()
            }
            left -= sum(len(key) + len(str(value)) for key, value in reported.items())
            if left < 0:
                break
            problems.append(reported)
        return Failure(self.kind, _cut(self.message, LONGEST_MESSAGE), problems)


class Place(Message, frozen=True):
    """Where to pack to; the segments' descriptors come with it.

    Attributes:
        places: int64 [n], each block's place, as they lie in memory.
        extents: Of each extent the index of its segment, its first byte, its bytes.
    """

    places: bytes
    extents: list[tuple[int, int, int]]


class CheckOnly(Message, frozen=True):
    """There is no room: the bytes are to be read and checked, and not packed."""


FromJob: TypeAlias = Opened | Checked | Done | Failure
ToJob: TypeAlias = Place | CheckOnly


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest - 40]} ... ({len(text) - longest + 40} characters left out)"
