"""The CPU tier: packed adapters in host memory, within a budget."""

from __future__ import annotations

from collections.abc import Container

from vllm_multilora.cache.budget import MIB, CpuBudget
from vllm_multilora.cache.cost import reload_cost
from vllm_multilora.cache.errors import CacheFullError
from vllm_multilora.cache.policy import CachePolicy
from vllm_multilora.cache.policy_tier import PolicyTier
from vllm_multilora.cache.protection import Protection


class CpuTier(PolicyTier):
    """Adapters with a host copy, those in slots among them.

    Attributes:
        budget: Its limits.
        sizes: Bytes of each adapter's host copy.
        bytes: Their sum.
    """

    def __init__(self, policy: CachePolicy, budget: CpuBudget) -> None:
        super().__init__(policy)
        self.budget = budget
        self.sizes: dict[int, int] = {}
        self.bytes = 0

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes fit without evicting anything."""
        return self.budget.fits(len(self.sizes) + 1, self.bytes + size)

    def take(self, adapter_id: int, size: int) -> None:
        self.sizes[adapter_id] = size
        self.bytes += size
        self._add(adapter_id, size, reload_cost(size))

    def drop(self, adapter_id: int) -> None:
        self.bytes -= self.sizes.pop(adapter_id)
        self._remove(adapter_id)

    def victims(
        self, adapter_id: int, size: int, *, in_slots: Container[int], protection: Protection
    ) -> tuple[int, ...]:
        """Who must leave for another adapter; those without a slot go first. Changes nothing.

        Args:
            adapter_id: The adapter that needs the room.
            size: Its bytes.
            in_slots: Adapters of the GPU tier.
            protection: Those that may not go.

        Raises:
            CacheFullError: Too little can be evicted.
        """
        if self.has_room(size):
            return ()
        evictable = [i for i in sorted(self.sizes) if i not in protection]
        adapters = len(self.sizes) - len(evictable)
        kept = self.bytes - sum(self.sizes[i] for i in evictable)
        if not self.budget.fits(adapters + 1, kept + size):
            raise self._full(adapter_id, size, adapters, kept, protection)
        without_slot = [i for i in evictable if i not in in_slots]
        victims: list[int] = []
        occupied = self.bytes
        while not self.budget.fits(len(self.sizes) - len(victims) + 1, occupied + size):
            pool = without_slot if len(victims) < len(without_slot) else evictable
            victim = self._choose(pool, victims)
            victims.append(victim)
            occupied -= self.sizes[victim]
        return tuple(victims)

    def _full(
        self, adapter_id: int, size: int, adapters: int, kept: int, protection: Protection
    ) -> CacheFullError:
        need = f"no room in host memory for adapter {adapter_id} ({size / MIB:.1f} MiB)"
        if not self.budget.fits(1, size):
            return CacheFullError(
                f"{need}: it alone is larger than the budget ({self.budget}); raise "
                "--multilora-cpu-cache-gib"
            )
        return CacheFullError(
            f"{need} within the budget ({self.budget}): {adapters} adapters with "
            f"{kept / MIB:.1f} MiB are in use ({protection.describe(self.sizes)}); raise "
            "--max-cpu-loras or --multilora-cpu-cache-gib, or unpin adapters"
        )
