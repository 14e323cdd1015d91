"""The fetching children: who waits for which, and what they say."""

from __future__ import annotations

import selectors
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import msgspec

from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.source_url import SourceUrl
from vllm_multilora.store.jobs.runner import RunningJob, forked
from vllm_multilora.store.protocol.job_messages import Failure
from vllm_multilora.store.sources.fetch_child import FetchAnswer, FetchRequest, be_child

MAX_FETCHES = 8
"""Fetches from one allowed source at a time; what hangs there does not hold up other sources."""

_T = TypeVar("_T")


@dataclass(eq=False)
class Fetch(Generic[_T]):
    """A fetch that waits for its turn, or has a child; `waiting` are those who wait for it."""

    request: FetchRequest
    root: SourceUrl
    waiting: list[_T] = field(default_factory=list)
    child: RunningJob | None = None
    sock: socket.socket | None = None
    said: bytes = b""


class Fetches(Generic[_T]):
    """Fetches, first come, first served for each allowed source.

    Args:
        done: Is called with a fetch that has an answer; its process ends afterwards.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        done: Callable[[Fetch[_T], FetchAnswer], None],
    ) -> None:
        self._selector = selector
        self._done = done
        self._fetches: list[Fetch[_T]] = []
        self._ended: list[RunningJob] = []

    def ask(self, request: FetchRequest, root: SourceUrl, who: _T, *, is_fresh: bool) -> None:
        """Has an adapter fetched, or waits with others; a fresh fetch begins after this call.

        Several of the same adapter download it once: they meet in the disk cache.
        """
        for fetch in self._fetches:
            if fetch.request == request and not (is_fresh and fetch.child):
                fetch.waiting.append(who)
                return
        self._fetches.append(Fetch(request, root, [who]))
        self._start_next()

    def leave(self, who: _T) -> None:
        """Somebody waits no more; what nobody waits for is ended, and goes on where it was."""
        for fetch in list(self._fetches):
            if who in fetch.waiting:
                fetch.waiting.remove(who)
                if not fetch.waiting:
                    self._end(fetch)
        self._start_next()

    def close(self) -> None:
        for fetch in list(self._fetches):
            self._end(fetch)

    def _start_next(self) -> None:
        running = Counter(fetch.root for fetch in self._fetches if fetch.child)
        for fetch in list(self._fetches):
            if fetch.child is None and running[fetch.root] < MAX_FETCHES:
                running[fetch.root] += 1
                try:
                    self._start(fetch)
                except OSError as error:
                    self._answer(fetch, _failed(f"the store cannot start a fetch: {error}"))

    def _start(self, fetch: Fetch[_T]) -> None:
        request = fetch.request
        fetch.child, fetch.sock = forked("a fetch", partial(be_child, request), request.descriptors)
        hear = partial(self._hear, fetch, fetch.sock)
        self._selector.register(fetch.sock, selectors.EVENT_READ, hear)

    def _hear(self, fetch: Fetch[_T], sock: socket.socket) -> None:
        if fetch not in self._fetches:
            return  # it has ended in the same round
        try:
            piece = sock.recv(1 << 16)
        except OSError:
            piece = b""
        fetch.said += piece
        if piece and not fetch.said.endswith(b"\n"):
            return
        try:
            answer = msgspec.json.decode(fetch.said, type=FetchAnswer)
        except msgspec.MsgspecError:
            url = fetch.request.url
            answer = _failed(f"{url}: the process that fetched it ended without an answer")
        self._answer(fetch, answer)
        self._start_next()

    def _answer(self, fetch: Fetch[_T], answer: FetchAnswer) -> None:
        self._fetches.remove(fetch)
        self._done(fetch, answer)
        self._end(fetch)

    def _end(self, fetch: Fetch[_T]) -> None:
        if fetch in self._fetches:
            self._fetches.remove(fetch)
        self._ended = [child for child in self._ended if child.gone() is None]
        if fetch.child is not None and fetch.sock is not None:
            self._selector.unregister(fetch.sock)
            fetch.sock.close()
            fetch.child.kill()
            self._ended.append(fetch.child)


def _failed(message: str) -> FetchAnswer:
    return FetchAnswer(failure=Failure(FailureKind.UNREADABLE, message, []))
