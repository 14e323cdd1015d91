"""Waiting for a tenant's turn while its client is watched, and holding answers to refusals back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from vllm_multilora.tenants.limits import Account, TokenBucket

if TYPE_CHECKING:
    from starlette.types import Message, Receive

MAX_HELD_BYTES = 1 << 20
"""Bytes of a waiting request's body that are read to notice that its client has gone."""

STRANGERS_PER_MINUTE = 3_000
"""Requests without a valid key that are answered per minute; a quiet minute saves up as many."""

LONGEST_PAUSE_S = 5.0
"""Maximum wait of a refused request for its answer, and of a tenant's next list for its turn."""


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

    async def receive_rest() -> Message:
        return held.pop(0) if held else await receive()

    return receive_rest


async def _listen(receive: Receive, held: list[Message]) -> None:
    size = 0
    while size < MAX_HELD_BYTES and not _has_gone(held):
        message = await receive()
        held.append(message)
        size += len(message.get("body", b""))


def _has_gone(held: list[Message]) -> bool:
    return bool(held) and held[-1]["type"] == "http.disconnect"


async def pause(requests: TokenBucket) -> None:
    """Delays the answer to a refused request where there are many of its kind.

    A connection's next request is read when its last one has been answered. So floods wait in the
    system's buffers and cost the event loop next to nothing.

    Args:
        requests: Counts the requests of this kind.
    """
    wait_s = requests.wait_s()
    if wait_s < LONGEST_PAUSE_S:
        requests.charge(1)
    if wait_s > 0:
        await asyncio.sleep(min(wait_s, LONGEST_PAUSE_S))
