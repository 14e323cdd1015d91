"""The GPU tier: the slots, and which adapter has which."""

from __future__ import annotations

from vllm_multilora.cache.errors import SlotsExhaustedError
from vllm_multilora.cache.policy import CachePolicy
from vllm_multilora.cache.policy_tier import PolicyTier
from vllm_multilora.cache.protection import Protection


class GpuTier(PolicyTier):
    """Adapters in slots; each slot has one adapter at most, each adapter one slot at most.

    Attributes:
        slots: The adapter in each slot; None where it is free.
        slot_of: The slot of each adapter that has one.
    """

    def __init__(self, policy: CachePolicy, slots: int) -> None:
        super().__init__(policy)
        self.slots: list[int | None] = [None] * slots
        self.slot_of: dict[int, int] = {}

    def take(self, adapter_id: int, slot: int) -> None:
        self.slots[slot] = adapter_id
        self.slot_of[adapter_id] = slot
        self._add(adapter_id, size=1, cost=1.0)

    def leave(self, adapter_id: int) -> int:
        """Frees the adapter's slot and returns it."""
        slot = self.slot_of.pop(adapter_id)
        self.slots[slot] = None
        self._remove(adapter_id)
        return slot

    def free_slots(self) -> list[int]:
        return [slot for slot, adapter_id in enumerate(self.slots) if adapter_id is None]

    def candidates(
        self, step: frozenset[int], needed: int, protection: Protection
    ) -> tuple[int, ...]:
        """Adapters that may give up their slots to a step, ascending; none if none are needed.

        Those of the preceding step are among them: the new step takes its place.

        Raises:
            SlotsExhaustedError: They are fewer than needed.
        """
        if len(step) > len(self.slots):
            raise SlotsExhaustedError(
                f"the step has {len(step)} adapters for {len(self.slots)} slots; raise --max-loras"
            )
        if not needed:
            return ()
        others = sorted(self.slot_of.keys() - step)
        candidates = tuple(i for i in others if not protection.is_kept(i))
        if len(candidates) < needed:
            raise SlotsExhaustedError(
                f"the step needs {needed} slots of other adapters and {len(candidates)} can be "
                f"given up: {len(others) - len(candidates)} adapters outside the step keep theirs, "
                "pinned or held by requests in flight; unpin adapters or raise --max-loras"
            )
        return candidates

    def spare_slot(self, protection: Protection) -> int | None:
        """A free slot, or that of an unprotected adapter which the policy would give up."""
        if free := self.free_slots():
            return free[0]
        idle = tuple(i for i in sorted(self.slot_of) if i not in protection)
        return self.slot_of[self._choose(idle, ())] if idle else None

    def victims(self, candidates: tuple[int, ...], needed: int) -> tuple[int, ...]:
        """The policy's choice of that many candidates, in the order chosen. Changes nothing."""
        victims: list[int] = []
        for _ in range(needed):
            victims.append(self._choose(candidates, victims))
        return tuple(victims)
