"""Locks by adapter name, only for names that are being worked with."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary


class LocksInUse:
    """Locks by name, for names that anybody may invent, as many and as long as they like."""

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
