"""One tier and its policy: what is in it, and what the policy has been told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_multilora.slots.policies.policy import CachePolicy, PolicyError


class PolicyTier:
    """Keeps a policy's view of one tier exact; the base of both tiers.

    A step's adapters are reported as used once each: those in the tier when the step is
    told, the others when they have entered.

    Args:
        policy: The tier's own.
    """

    def __init__(self, policy: CachePolicy) -> None:
        self._policy = policy
        self._sizes: dict[int, int] = {}  # of what is in the tier
        self._running: frozenset[int] = frozenset()  # the adapters of the last step
        self._joined: frozenset[int] = frozenset()
        self._unreported: frozenset[int] = frozenset()

    def used(self, adapters: Iterable[int]) -> None:
        """Tells the adapters of the running batch now, whether they are in the tier or not.

        Those in the tier are reported to the policy, unless they were for the same batch.
        """
        step = frozenset(adapters)
        if step != self._running:
            self._joined = step - self._running
            self._running = self._unreported = step
        self._report()

    def _report(self) -> None:
        """Reports those adapters of the step that are in the tier and not reported yet."""
        present = self._unreported & self._sizes.keys()
        if present:
            self._unreported -= present
            self._policy.used(sorted(present), sorted(present & self._joined))

    def _add(self, adapter_id: int, size: int, cost: float) -> None:
        self._sizes[adapter_id] = size
        self._policy.added(adapter_id, size, cost)

    def _remove(self, adapter_id: int) -> None:
        del self._sizes[adapter_id]
        self._policy.removed(adapter_id)
        if adapter_id in self._running:  # to be reported again should it return for the same step
            self._unreported |= {adapter_id}

    def _choose(self, candidates: Sequence[int]) -> int:
        """The policy's choice among adapters of the tier, ascending.

        Raises:
            PolicyError: The policy names none of them.
        """
        victim = self._policy.victim(candidates)
        if victim not in candidates:
            raise PolicyError(
                f"cache policy {type(self._policy).__name__} chose {victim!r} as victim; it must "
                f"choose one of the candidates {list(candidates)}"
            )
        return victim
