"""The usage log: a line of JSON for each prompt that was answered or abandoned.

Lines are written on a thread of their own, behind a queue of limited length: a disk that is slow or
full for long costs lines, which the log then says, and never a request any time. Several API
servers may write to one log: each appends whole lines. A log that has grown to its limit is
renamed, with the time added, and a new one begun; nothing is ever deleted. What a writer that was
killed has left of a line stays a line of its own.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from vllm_multilora.errors import ConfigError
from vllm_multilora.wording import counted

logger = logging.getLogger(__name__)

_MAX_QUEUED = 16_384
_MAX_AT_ONCE = 512  # lines of one write
_CLOSE_LIMIT_S = 5.0
_COMPLAIN_S = 60.0
_RETRY_S = 1.0  # until lines are tried again that could not be written
_MAX_ID = 256  # characters of a request's id, which clients may choose
_IN_LOG = {"cached_tokens": "cached_prompt_tokens", "generated_tokens": "generation_tokens"}


class Status(StrEnum):
    """How a prompt's work has ended."""

    OK = "ok"
    ABORTED = "aborted"  # the client has gone, or the server was told to stop
    FAILED = "failed"


@dataclass
class Usage:
    """Tokens as an answer's `usage` counts them.

    Attributes:
        request_id: vLLM's id of the prompt: the answer's, for most endpoints with the number of the
            prompt after it, as in `cmpl-...-0`.
        adapter: The adapter's name; None for the base model.
        version: The digest of the weights that have computed it; None if nothing was.
        route: The route that the client asked for; None if it named a model.
        prompt_tokens: Of the prompt, once for all choices; 0 if no choice has got as far.
        cached_tokens: Those of them that were found in the prefix cache by the first choice.
        generated_tokens: Of all choices.
    """

    request_id: str
    tenant: str | None = None
    route: str | None = None
    adapter: str | None = None
    version: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    status: Status = Status.OK
    is_blend: bool = False


class UsageLog:
    """One process's end of a log; `write` is for any thread.

    Args:
        path: The file; its folder must exist.
        limit: Bytes at which it is renamed and begun anew.
        most_queued: Lines that may wait to be written.
        on_dropped: Called with how many lines were lost, on the log's thread.

    Raises:
        ConfigError: It cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        limit: int,
        *,
        most_queued: int = _MAX_QUEUED,
        on_dropped: Callable[[int], object] = lambda lines: None,
    ) -> None:
        self._path, self._limit, self._on_dropped = path, limit, on_dropped
        # With the Unix time at which each has ended: the disk may be slow.
        self._queue: queue.Queue[tuple[float, Usage] | None] = queue.Queue(most_queued)
        self._dropped = 0
        self._next_complaint = 0.0
        self._is_closing = threading.Event()
        require_writable(path)
        self._thread = threading.Thread(target=self._run, name="multilora-usage-log", daemon=True)
        self._thread.start()

    def write(self, usage: Usage) -> None:
        """Has a line written; drops it, and counts that, where too many wait already.

        A long id loses its middle: at its end is the prompt's number.
        """
        if len(name := usage.request_id) > _MAX_ID:
            half = (_MAX_ID - 3) // 2
            usage = replace(usage, request_id=f"{name[:half]}...{name[-half:]}")
        try:
            self._queue.put_nowait((time.time(), usage))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Writes what waits, within a few seconds; what cannot be written then is lost."""
        self._is_closing.set()
        try:
            self._queue.put(None, timeout=_CLOSE_LIMIT_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_LIMIT_S)

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch = [self._queue.get()]
            while len(batch) < _MAX_AT_ONCE and not self._queue.empty():
                batch.append(self._queue.get())
            is_open = None not in batch
            lines = [_line(*ended) for ended in batch if ended is not None]
            dropped, self._dropped = self._dropped, 0
            if dropped:
                lines.append(_json({"time": _text(time.time()), "dropped": dropped}))
                self._complain("were dropped: they cannot be written as fast as they come")
                self._on_dropped(dropped)
            self._write_out(lines)

    def _write_out(self, lines: list[str]) -> None:
        """Writes lines, as soon as that can be done; meanwhile, others wait in the queue."""
        content = "".join(lines).encode()
        while True:
            is_last_try = self._is_closing.is_set()
            try:
                self._append(content)
            except OSError as error:
                if not is_last_try:
                    self._complain(f"wait, as they cannot be written: {error}")
                    self._is_closing.wait(_RETRY_S)
                    continue
                text = "The usage log %s lacks %s that could not be written: %s"
                logger.warning(text, self._path, counted(len(lines), "line"), error)
            return

    def _append(self, content: bytes) -> None:
        is_done = False
        while not is_done:
            descriptor = _open(self._path)
            try:
                # One writer at a time, so that nobody renames what another is about to write to.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if is_done := self._is_current(descriptor):
                    self._append_to(descriptor, content)
            finally:
                os.close(descriptor)

    def _append_to(self, descriptor: int, content: bytes) -> None:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            content = b"\n" + content  # whoever wrote the last line was killed in its midst
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError:
            os.ftruncate(descriptor, size)  # else the next line would go on in half of this one
            raise
        if os.fstat(descriptor).st_size >= self._limit and self._is_current(descriptor):
            self._rename()

    def _rename(self) -> None:
        path = self._path.resolve()  # a link stays, and what it leads to is begun anew
        try:
            path.rename(_next_name(path))
        except OSError as error:
            self._complain(f"go on in it beyond its limit, as it cannot be renamed: {error}")

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def _complain(self, why: str) -> None:
        if time.monotonic() >= self._next_complaint:
            self._next_complaint = time.monotonic() + _COMPLAIN_S
            logger.warning("Lines of the usage log %s %s.", self._path, why)


def _next_name(path: Path) -> Path:
    stem = f"{path.name}.{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = (path.with_name(f"{stem}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def require_writable(path: Path) -> None:
    """Sees to it that a log can be written, by making it where there is none.

    Raises:
        ConfigError: It cannot.
    """
    try:
        os.close(_open(path))
    except OSError as error:
        raise ConfigError(
            f"the usage log {str(path)!r} cannot be written to: {error.strerror}; choose a file in "
            "a folder that exists and that the server may write to"
        ) from error


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _line(at: float, usage: Usage) -> str:
    fields = {_IN_LOG.get(name, name): value for name, value in vars(usage).items()}
    del fields["is_blend"]
    return _json({"time": _text(at), **fields})


def _json(value: dict[str, object]) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"


def _text(at: float) -> str:
    text = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
