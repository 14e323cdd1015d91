r"""A cache policy of your own: LRU-2, in one file.

What counts is the time of an adapter's last use but one, so that a single request, however
recent, does not outweigh regular customers.

Try it on a trace; the folder must be on Python's path, in the server's processes too:

    PYTHONPATH=examples/cache_policy vllm-multilora simulate --synthetic scan \
        --policy lru --policy lru2_policy:Lru2Policy

Serve with it: `--multilora-cache-policy lru2_policy:Lru2Policy`. A package gives it a short
name with an entry point:

    [project.entry-points."vllm_multilora.cache_policies"]
    lru2 = "lru2_policy:Lru2Policy"

Source: O'Neil, O'Neil and Weikum, "The LRU-K page replacement algorithm for database disk
buffering", SIGMOD 1993.
"""

from collections.abc import Sequence

from vllm_multilora.slots import CachePolicy


class Lru2Policy(CachePolicy):
    """Gives up the adapter whose last use but one is longest ago."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[int, int] = {}
        self._last_but_one: dict[int, int] = {}

    def added(self, adapter_id: int, size: int, cost: float) -> None:
        self._last[adapter_id] = self._last_but_one[adapter_id] = 0

    def used(self, adapter_ids: Sequence[int], joined: Sequence[int]) -> None:
        # Logical time: no wall clock, no random numbers, so that `vllm-multilora simulate` chooses
        # the victims that a server would choose.
        self._clock += 1
        for adapter_id in joined:  # a request's further steps are the same use
            self._last_but_one[adapter_id] = self._last[adapter_id]
        for adapter_id in adapter_ids:
            self._last[adapter_id] = self._clock

    def removed(self, adapter_id: int) -> None:
        del self._last[adapter_id], self._last_but_one[adapter_id]

    def victim(self, candidates: Sequence[int]) -> int:
        # `min` takes the first of equals and the candidates ascend, so ties are settled alike.
        return min(candidates, key=lambda i: (self._last_but_one[i], self._last[i]))
