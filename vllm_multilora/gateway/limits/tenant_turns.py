"""Waiting for a tenant's turn while its client is watched, and holding answers to refusals back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any

from vllm_multilora.gateway.names.bodies import again
from vllm_multilora.tenants.limits import Account, LimitReachedError, Pace, TokenBucket

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_HELD_BYTES = 1 << 20
"""Bytes of a waiting request's body that are read to notice that its client has gone."""

STRANGERS_PER_MINUTE = 3_000
"""Requests without a valid key that are answered per minute; a quiet minute saves up as many."""

LONGEST_PAUSE_S = 5.0
"""Maximum wait of a refused request for its answer, and of a tenant's next list for its turn."""

LISTING_SHARE = 0.05
"""Share of the event loop's time for each kind of list of one tenant: models, adapters."""


class ClientGoneError(Exception):
    """A client went before its request had its turn."""


async def turn_of(account: Account, receive: Receive) -> Receive:
    """Waits for a call's turn, for as long as its client does; whoever has had it ends it.

    Returns:
        What the application receives from: what came while the call waited, and then the rest.

    Raises:
        LimitReachedError: The call is one too many.
        ServerStoppedError: No call has its turn any more.
        ClientGoneError: The client has gone.
    """
    turn = account.begin()
    held: list[Message] = []
    if not turn.done():
        listening = asyncio.ensure_future(_listen(receive, held))
        try:
            await asyncio.wait({turn, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not _has_gone(held):  # it may have sent more than is held: it is not heard then
                await asyncio.wait({turn})
        except BaseException:
            account.give_up(turn)
            raise
        finally:
            listening.cancel()
        if _has_gone(held):
            account.give_up(turn)
            raise ClientGoneError
        turn.result()
    return again(held, receive)


async def _listen(receive: Receive, held: list[Message]) -> None:
    size = 0
    while size < MAX_HELD_BYTES and not _has_gone(held):
        message = await receive()
        held.append(message)
        size += len(message.get("body", b""))


def _has_gone(held: list[Message]) -> bool:
    return bool(held) and held[-1]["type"] == "http.disconnect"


async def pause(requests: TokenBucket) -> None:
    """Delays the answer to a refused request where `requests` counts many of its kind.

    A connection's next request is read when its last one has been answered. So floods wait in the
    system's buffers and cost the event loop next to nothing.
    """
    wait_s = requests.wait_s()
    if wait_s < LONGEST_PAUSE_S:
        requests.charge(1)
    if wait_s > 0:
        await asyncio.sleep(min(wait_s, LONGEST_PAUSE_S))


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
            seconds = time.thread_time() - making.begun
            pace.end(min(seconds / LISTING_SHARE, LONGEST_PAUSE_S))

    async def send_made(message: Message) -> None:
        let_next_begin()
        await send(message)

    making = _Timed(app(scope, receive, send_made))
    try:
        await making
    finally:
        let_next_begin()


class _Timed:
    """An awaitable that measures how long it keeps the event loop busy.

    Attributes:
        begun: When it would have begun, by the thread's processor time, without others in between.
    """

    def __init__(self, work: Awaitable[None]) -> None:
        self._work = work.__await__()
        self.begun = time.thread_time()

    def __await__(self) -> Generator[Any, Any, None]:
        resume: Callable[[Any], Any] = self._work.send
        value: Any = None
        while True:
            try:
                awaited = resume(value)
            except StopIteration:
                return
            left = time.thread_time()
            try:
                resume, value = self._work.send, (yield awaited)
            except BaseException as error:
                resume, value = self._work.throw, error
            self.begun += time.thread_time() - left
