"""Holds back the answers to refused requests where there are many."""

from __future__ import annotations

import asyncio

from vllm_multilora.tenants.limits import TokenBucket

STRANGERS_PER_MINUTE = 3_000
"""Requests without a valid key that are answered per minute; a quiet minute saves up as many."""

LONGEST_PAUSE_S = 5.0
"""Maximum wait of a refused request for its answer, and of a tenant's next list for its turn."""


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
