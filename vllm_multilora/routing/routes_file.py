"""A routes file that may be changed while its routes are in use."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from vllm_multilora.routing.errors import RoutesFileError
from vllm_multilora.routing.parsing import Routes, parse_routes

logger = logging.getLogger(__name__)

_RACY_NS = 2_000_000_000
"""Within this time of a change, a file may change again and look the same: time stamps are
coarse."""


def load_routes(path: str | os.PathLike[str]) -> Routes:
    """Reads a routes file.

    Raises:
        RoutesFileError: It cannot be read, or something in it is wrong.
    """
    return parse_routes(os.fspath(path), _text(_read(path), path))


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise RoutesFileError(
            f"{os.fspath(path)}: cannot read the routes: {error.strerror or error}; expected a "
            f"readable YAML or JSON file"
        ) from None


def _text(content: bytes, path: str | os.PathLike[str]) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RoutesFileError(
            f"{os.fspath(path)}: found byte {content[error.start]:#04x} at offset {error.start}, "
            f"expected UTF-8 text"
        ) from None


class RoutesFile:
    """The routes of a file, read again when it changes.

    `refresh` may run in any thread, one at a time; `routes` may be read from any other meanwhile.

    Args:
        path: The file.
        check: Raises `RoutesFileError` where routes cannot be used for other reasons.

    Raises:
        RoutesFileError: The file cannot be used as it is.
    """

    def __init__(
        self, path: str | os.PathLike[str], check: Callable[[Routes], None] = lambda routes: None
    ) -> None:
        self.path = path
        self._check = check
        self._seen = self._signature()
        self._seen_at_ns = time.time_ns()
        content = _read(path)
        self._content = hashlib.sha256(content).digest()
        self.routes = self._parse(content)
        self._complaint: str | None = None

    def refresh(self) -> bool:
        """Reads the file again if it has changed.

        A file that cannot be used leaves the routes as they are, and its error is logged once.

        Returns:
            Whether there are new routes.
        """
        signature = self._signature()
        if signature == self._seen and not self._is_racy(signature):
            return False
        self._seen, self._seen_at_ns = signature, time.time_ns()
        try:
            content = _read(self.path)
            digest = hashlib.sha256(content).digest()
            if digest == self._content:
                self._complaint = None
                return False
            routes = self._parse(content)
        except RoutesFileError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                logger.error("The routes stay as they were. %s", error)
            return False
        self.routes, self._content, self._complaint = routes, digest, None
        logger.info("Read %d routes from %s", len(routes.targets), self.path)
        return True

    def _parse(self, content: bytes) -> Routes:
        routes = parse_routes(os.fspath(self.path), _text(content, self.path))
        self._check(routes)
        return routes

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            status = Path(self.path).stat()  # of what a link leads to, as ConfigMaps need
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _is_racy(self, signature: tuple[int, int, int] | None) -> bool:
        return signature is not None and self._seen_at_ns - signature[0] < _RACY_NS
