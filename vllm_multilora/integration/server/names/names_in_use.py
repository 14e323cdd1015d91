"""Locks by adapter name, only for names that are being worked with."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary


class LocksInUse:
    """In the place of vLLM's locks, of which there is one for every name ever asked for.

    Any client can ask for names that there are not, as many and as long as it likes.
    """

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._locks)

    def __getitem__(self, name: str) -> asyncio.Lock:
        """The lock of a name, which lives for as long as somebody holds or awaits it."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock
