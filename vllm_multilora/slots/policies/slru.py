"""Segmented LRU."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_multilora.slots.policies.lru import LruPolicy

PROTECTED_SHARE = 0.8
"""Most of the tier's content that is protected; the rest is on probation."""


class SlruPolicy(LruPolicy):
    """Two LRU segments: adapters are on probation until they are used a second time.

    Victims are the least recently used on probation, and only without any of those the least
    recently used of the protected. What outgrows the protected share goes back to the recent end
    of the probation segment. A use is an adapter's joining the running batch: the steps of one
    request must not pass for a second use. A scan passes through probation and leaves the
    protected adapters alone.

    The share is of what the tier holds when a victim is needed, counted in size: the tier is full
    then, so that is its capacity. While it fills, any number may be protected.

    Source: Karedla, Love and Wherry, "Caching strategies to improve disk system performance",
    IEEE Computer 27(3), 1994.
    """

    def __init__(self) -> None:
        super().__init__()
        self._size: dict[int, int] = {}
        self._unused: set[int] = set()
        self._protected: set[int] = set()
        self._total_size = 0
        self._protected_size = 0

    def added(self, adapter_id: int, size: int, cost: float) -> None:
        super().added(adapter_id, size, cost)
        self._size[adapter_id] = size
        self._total_size += size
        self._unused.add(adapter_id)

    def used(self, adapter_ids: Sequence[int], joined: Sequence[int]) -> None:
        super().used(adapter_ids, joined)
        for adapter_id in joined:
            if adapter_id in self._unused:
                self._unused.remove(adapter_id)
            elif adapter_id not in self._protected:
                self._protected.add(adapter_id)
                self._protected_size += self._size[adapter_id]

    def removed(self, adapter_id: int) -> None:
        size = self._size.pop(adapter_id)
        self._total_size -= size
        super().removed(adapter_id)
        self._unused.discard(adapter_id)
        if adapter_id in self._protected:
            self._protected.remove(adapter_id)
            self._protected_size -= size

    def victim(self, candidates: Sequence[int]) -> int:
        self._keep_share()
        return min(candidates, key=lambda i: (i in self._protected, self._last_use[i]))

    def _keep_share(self) -> None:
        """Sends the oldest protected adapters back while they are too many."""
        while self._protected_size > PROTECTED_SHARE * self._total_size:
            oldest = min(self._protected, key=lambda i: (self._last_use[i], i))
            self._protected.remove(oldest)
            self._protected_size -= self._size[oldest]
            self._last_use[oldest] = self._clock
