"""A settings file that may be changed while it is in use."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from vllm_multilora.documents.document import DocumentError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_RACY_NS = 2_000_000_000
"""Within this time of a change, a file may change again and look the same: time stamps are
coarse."""

_MAX_BYTES = 64 << 20
"""Size of the largest file that is read: a wrong path must not fill a server's memory."""

_RETRY_NS = 5_000_000_000
"""Until what could not be used is tried again, looking as it did: permissions, or names that its
content must not have, may be others by then."""


def read_file(path: str | os.PathLike[str], parse: Callable[[str, str], _T], what: str) -> _T:
    """Reads a file once.

    Args:
        path: The file.
        parse: Makes something of the file's name and its text, or raises `DocumentError`.
        what: What is in it, for messages: "routes".

    Raises:
        DocumentError: It cannot be read, or something in it is wrong.
    """
    return parse(os.fspath(path), _text(_read(path, what), path))


def _read(path: str | os.PathLike[str], what: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DocumentError(
            f"{os.fspath(path)}: cannot read the {what}: {error.strerror or error}; expected a "
            f"readable file"
        ) from error
    if len(content) > _MAX_BYTES:
        raise DocumentError(
            f"{os.fspath(path)}: found more than {_MAX_BYTES >> 20} MiB, expected {what}"
        )
    return content


def _text(content: bytes, path: str | os.PathLike[str]) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{os.fspath(path)}: found byte {content[error.start]:#04x} at offset {error.start}, "
            f"expected UTF-8 text"
        ) from None


class WatchedFile(Generic[_T]):
    """What a file says, read again when it changes.

    `refresh` may run in any thread, one at a time; `value` may be read from any other meanwhile.

    Args:
        path: The file.
        parse: Makes the value of the file's name and its text, or raises `DocumentError`.
        what: What is in it, for messages: "routes".

    Raises:
        DocumentError: The file cannot be used as it is.
    """

    def __init__(
        self, path: str | os.PathLike[str], parse: Callable[[str, str], _T], what: str
    ) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"multilora-{what}")
        self._parse_text = parse
        self._what = what
        self._seen = self._signature()
        self._seen_at_ns = time.time_ns()
        content = _read(path, what)
        self._content = hashlib.sha256(content).digest()
        self.value = self._parse(content)
        self._complaint: str | None = None

    def refresh(self) -> bool:
        """Reads the file again if it has changed.

        A file that cannot be used leaves the value as it is, and its error is logged once.

        Returns:
            Whether there is a new value.
        """
        signature = self._signature()
        if signature == self._seen and not self._is_worth_a_look(signature):
            return False
        self._seen, self._seen_at_ns = signature, time.time_ns()
        try:
            content = _read(self.path, self._what)
            digest = hashlib.sha256(content).digest()
            if digest == self._content:
                self._complaint = None
                return False
            value = self._parse(content)
        except Exception as error:  # whoever asks has the value that was there, whatever happens
            is_expected = isinstance(error, DocumentError)
            complaint = str(error) if is_expected else f"{self.path}: {error!r}"
            if complaint != self._complaint:
                self._complaint = complaint
                text = "The %s stay as they were. %s"
                logger.error(text, self._what, complaint, exc_info=not is_expected)
            return False
        self.value, self._content, self._complaint = value, digest, None
        logger.info("Read the %s in %s again", self._what, self.path)
        return True

    async def refresh_on_thread(self) -> bool:
        """As `refresh`, while an event loop goes on: storage may be slow, and a file be large.

        On a thread of its own: what clients ask for may keep all of asyncio's busy.

        Raises:
            RuntimeError: The thread could not be started.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.refresh)

    def _parse(self, content: bytes) -> _T:
        return self._parse_text(os.fspath(self.path), _text(content, self.path))

    def _signature(self) -> tuple[int, ...] | None:
        try:
            status = Path(self.path).stat()  # of what a link leads to, as ConfigMaps need
        except OSError:
            return None
        # The second time says when anything about it last changed; nobody can set it.
        times = status.st_mtime_ns, status.st_ctime_ns
        return *times, status.st_size, status.st_ino, status.st_dev

    def _is_worth_a_look(self, signature: tuple[int, ...] | None) -> bool:
        """Whether a file that looks as it did last time may be used otherwise now."""
        if self._complaint is not None and abs(time.time_ns() - self._seen_at_ns) > _RETRY_NS:
            return True
        return signature is not None and self._seen_at_ns - max(signature[:2]) < _RACY_NS
