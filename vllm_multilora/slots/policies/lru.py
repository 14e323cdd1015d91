"""Least recently used."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_multilora.slots.policies.policy import CachePolicy


class LruPolicy(CachePolicy):
    """Gives up the adapter whose last use is longest ago; entering the tier counts as a use.

    Source: the classic rule, analysed in Sleator and Tarjan, "Amortized efficiency of list update
    and paging rules", CACM 28(2), 1985: at most k times the misses of an optimal cache with k
    places. A scan over more adapters than there is room for leaves nothing of the working set.
    """

    def __init__(self) -> None:
        self._clock = 0
        self._last_use: dict[int, int] = {}

    def added(self, adapter_id: int, size: int, cost: float) -> None:
        # As recent as the latest use, not as old as never: preloaded adapters would otherwise
        # always make room for each other.
        self._last_use[adapter_id] = self._clock

    def used(self, adapter_ids: Sequence[int], joined: Sequence[int]) -> None:
        self._clock += 1
        self._last_use.update(dict.fromkeys(adapter_ids, self._clock))

    def removed(self, adapter_id: int) -> None:
        del self._last_use[adapter_id]

    def victim(self, candidates: Sequence[int]) -> int:
        return min(candidates, key=self._last_use.__getitem__)
