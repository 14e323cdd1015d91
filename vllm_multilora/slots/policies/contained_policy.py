"""Wraps a third-party policy so that its errors cannot end the process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from vllm_multilora.slots.policies.lru import LruPolicy
from vllm_multilora.slots.policies.policy import CachePolicy

logger = logging.getLogger(__name__)


class ContainedPolicy(CachePolicy):
    """Passes everything on to a policy until it fails, and decides by LRU from then on.

    A policy fails if it raises an exception or chooses an adapter that was not offered. Which one
    it was and how is logged, once. The adapters of the tier count as equally recent then.
    """

    def __init__(self, policy: CachePolicy) -> None:
        self._policy = policy
        self._members: dict[int, tuple[int, float]] = {}

    def added(self, adapter_id: int, size: int, cost: float) -> None:
        self._members[adapter_id] = (size, cost)
        self._tell(lambda: self._policy.added(adapter_id, size, cost))

    def used(self, adapter_ids: Sequence[int], joined: Sequence[int]) -> None:
        self._tell(lambda: self._policy.used(adapter_ids, joined))

    def removed(self, adapter_id: int) -> None:
        # A policy that fails here is replaced by one that never knew the adapter.
        del self._members[adapter_id]
        self._tell(lambda: self._policy.removed(adapter_id))

    def victim(self, candidates: Sequence[int]) -> int:
        try:
            victim = self._policy.victim(candidates)
        except Exception as error:
            self._replace(f"it raised {type(error).__name__}: {error}", error)
        else:
            if victim in candidates:
                return victim
            self._replace(f"it chose {victim!r} as victim, not one of {list(candidates)}")
        return self._policy.victim(candidates)

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._replace(f"it raised {type(error).__name__}: {error}", error)

    def _replace(self, reason: str, error: Exception | None = None) -> None:
        logger.error(
            "Cache policy %s has failed and is replaced by LRU until the next start: %s",
            type(self._policy).__name__,
            reason,
            exc_info=error,
        )
        self._policy = LruPolicy()
        for adapter_id, (size, cost) in self._members.items():
            self._policy.added(adapter_id, size, cost)
