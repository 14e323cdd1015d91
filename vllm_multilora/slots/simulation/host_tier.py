"""Host memory as simulations have it: adapters of one size each, within a budget."""

from __future__ import annotations

from collections.abc import Set

from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.policies.policy import CachePolicy, PolicyTier, reload_cost


class HostTier(PolicyTier):
    """The packs in host memory: one version of an adapter each, by number.

    An adapter in a slot needs no pack, so packs of adapters in slots are evicted like any other.

    Args:
        policy: Chooses the victims; sizes are bytes.
        budget: Limits of the tier.

    Attributes:
        bytes: Bytes of all packs.
    """

    def __init__(self, policy: CachePolicy, budget: CpuBudget) -> None:
        super().__init__(policy)
        self.bytes = 0
        self._budget = budget

    def __contains__(self, pack: int) -> bool:
        return pack in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def take(self, pack: int, size: int, protected: Set[int] = frozenset()) -> list[int] | None:
        """A pack, not in the tier yet, enters it; as few others as suffice leave for it.

        Args:
            pack: Its number.
            size: Its bytes.
            protected: Packs that may not leave.

        Returns:
            The packs that have left, in the policy's order. None if too few may leave: nothing has
            changed.

        Raises:
            PolicyError: The policy chose a pack that was not offered.
        """
        victims: list[int] = []
        if not self._has_room(size):
            idle = [other for other in sorted(self._sizes) if other not in protected]
            staying = self.bytes - sum(self._sizes[other] for other in idle)
            if not self._budget.fits(len(self._sizes) - len(idle) + 1, staying + size):
                return None
            while not self._has_room(size):
                victims.append(self._choose(idle))
                idle.remove(victims[-1])
                self.drop(victims[-1])
        self.bytes += size
        self._add(pack, size, reload_cost(size))
        self._report()
        return victims

    def drop(self, pack: int) -> None:
        """A pack leaves the tier."""
        self.bytes -= self._sizes[pack]
        self._remove(pack)

    def _has_room(self, size: int) -> bool:
        return self._budget.fits(len(self._sizes) + 1, self.bytes + size)
