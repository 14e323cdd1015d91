"""Looks at storage that may hang, on behalf of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

_MOST = 1_024

_T = TypeVar("_T")


class PendingLooks:
    """Looks that have not ended; used on one event loop.

    Nobody waits for one longer than the limit. It goes on all the same, and a thread that stands
    still has it in its queue until then: so there are not more of them than a thousand.

    Args:
        limit_s: Seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._looks: set[asyncio.Future[Any]] = set()

    async def wait(self, begin: Callable[[], Awaitable[_T]]) -> _T:
        """Begins a look and waits for what it finds.

        Raises:
            TimeoutError: It has not ended in time, or too many others have not.
        """
        if len(self._looks) >= _MOST:
            raise TimeoutError("too many looks at storage have not ended")
        look = asyncio.ensure_future(begin())
        self._looks.add(look)
        look.add_done_callback(self._ended)
        await asyncio.wait({look}, timeout=self._limit_s)
        if not look.done():
            raise TimeoutError(f"storage has not answered within {self._limit_s:g} s")
        return look.result()

    def _ended(self, look: asyncio.Future[Any]) -> None:
        self._looks.discard(look)
        if not look.cancelled():
            look.exception()  # nobody may be left to hear of it, and asyncio would log each
