"""Answers a tenant's lists one after the other, in a small share of the event loop's time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any

from vllm_multilora.gateway.limits.tenant_turns import LONGEST_PAUSE_S
from vllm_multilora.tenants.limits import LimitReachedError, Pace

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LISTING_SHARE = 0.05
"""Share of the event loop's time for each kind of list of one tenant: models, adapters."""


async def list_in_turn(
    app: ASGIApp, pace: Pace, scope: Scope, receive: Receive, send: Send
) -> None:
    """Lists a tenant's models or adapters when it is its turn.

    However long a list is, and however often a tenant asks for it, nobody else waits for long. The
    next list waits neither for this one's reader nor for work done for others meanwhile.

    Raises:
        LimitReachedError: Too many lists were asked for before this one.
    """
    try:
        async with asyncio.timeout(2 * LONGEST_PAUSE_S):
            await pace.begin()
    except TimeoutError:
        raise LimitReachedError("it is asked for faster than it can be answered") from None
    is_made = False

    def let_next_begin() -> None:
        nonlocal is_made
        if not is_made:
            is_made = True
            pace.end(min(making.seconds / LISTING_SHARE, LONGEST_PAUSE_S))

    async def send_made(message: Message) -> None:
        let_next_begin()
        await send(message)

    making = _Timed(app(scope, receive, send_made))
    try:
        await making
    finally:
        let_next_begin()


class _Timed:
    """An awaitable that measures how long it keeps the event loop busy."""

    def __init__(self, work: Awaitable[None]) -> None:
        self._work = work
        self._seconds = 0.0
        self._since: float | None = None  # when it was resumed; None while others are

    @property
    def seconds(self) -> float:
        """Processor time of this thread that it has taken so far."""
        return self._seconds + (0.0 if self._since is None else time.thread_time() - self._since)

    def __await__(self) -> Generator[Any, Any, None]:
        work = self._work.__await__()
        resume: Callable[[Any], Any] = work.send
        value: Any = None
        while True:
            self._since = time.thread_time()
            try:
                awaited = resume(value)
            except StopIteration:
                return
            finally:
                self._seconds, self._since = self.seconds, None
            try:
                resume, value = work.send, (yield awaited)
            except BaseException as error:
                resume, value = work.throw, error
