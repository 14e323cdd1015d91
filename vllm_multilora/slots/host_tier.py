"""Host memory: packed adapters within a budget, and which one is evicted for another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from types import MappingProxyType

from vllm_multilora.slots.budget import MIB, CpuBudget
from vllm_multilora.slots.cost import reload_cost
from vllm_multilora.slots.errors import HostMemoryFullError
from vllm_multilora.slots.policy import CachePolicy
from vllm_multilora.slots.policy_tier import PolicyTier


class HostTier(PolicyTier):
    """The packs in host memory: one version of an adapter each, by number.

    A pack counts from `take` on, so whoever reads one takes its room first. Which packs are on
    lease (being read, waiting to be copied, being copied) is for the caller to say: those are
    never victims. An adapter in a slot needs no pack, so packs of adapters in slots are evicted
    like any other.

    Args:
        policy: Chooses the victims; sizes are bytes.
        budget: Limits of the tier.

    Attributes:
        budget: As given.
        bytes: Bytes of all packs.
    """

    def __init__(self, policy: CachePolicy, budget: CpuBudget) -> None:
        super().__init__(policy)
        self.budget = budget
        self.bytes = 0
        self._sizes: dict[int, int] = {}

    @property
    def sizes(self) -> Mapping[int, int]:
        """Bytes of each pack; a view."""
        return MappingProxyType(self._sizes)

    def __contains__(self, pack: int) -> bool:
        return pack in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def used(self, packs: Collection[int]) -> None:
        """Tells the packs of all running batches now, whether they are in the tier or not.

        Those in the tier are reported to the policy if the packs differ from the last call's.
        """
        self.announce(frozenset(packs))

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes fit without evicting anything."""
        return self.budget.fits(len(self._sizes) + 1, self.bytes + size)

    def take(self, pack: int, size: int) -> None:
        """A pack enters the tier.

        Args:
            pack: Its number; not in the tier.
            size: Its bytes, at least 1; `has_room` for them.

        Raises:
            ValueError: One of these is not so; nothing has changed.
        """
        if size < 1:
            raise ValueError(f"the size of pack {pack} must be positive, got {size}")
        if pack in self._sizes:
            raise ValueError(f"pack {pack} is in host memory already")
        if not self.has_room(size):
            raise ValueError(
                f"pack {pack} of {size} bytes does not fit beside {len(self._sizes)} packs of "
                f"{self.bytes} bytes ({self.budget}): drop the victims first"
            )
        self._sizes[pack] = size
        self.bytes += size
        self._add(pack, size, reload_cost(size))
        self.report()

    def drop(self, pack: int) -> None:
        """A pack leaves the tier: as a victim, unloaded, or because its load failed.

        Raises:
            KeyError: It is not in the tier.
        """
        self.bytes -= self._sizes.pop(pack)
        self._remove(pack)

    def victims(self, size: int, protected: Set[int]) -> tuple[int, ...]:
        """Which packs must leave for one more, in the policy's order; as few as suffice.

        Nothing has changed: the caller drops them.

        Args:
            size: Bytes of the pack to come.
            protected: Packs that may not leave.

        Raises:
            HostMemoryFullError: Too few may leave.
            PolicyError: The policy chose a pack that was not offered.
        """
        if self.has_room(size):
            return ()
        evictable = [pack for pack in sorted(self._sizes) if pack not in protected]
        kept = self.bytes - sum(self._sizes[pack] for pack in evictable)
        packs = len(self._sizes) - len(evictable)
        if not self.budget.fits(packs + 1, kept + size):
            raise self._full(size, packs, kept)
        victims: list[int] = []
        occupied = self.bytes
        while not self.budget.fits(len(self._sizes) - len(victims) + 1, occupied + size):
            victims.append(self._choose(evictable, victims))
            occupied -= self._sizes[victims[-1]]
        return tuple(victims)

    def _full(self, size: int, packs: int, kept: int) -> HostMemoryFullError:
        need = f"no room in host memory for an adapter of {size / MIB:.1f} MiB"
        if not self.budget.fits(1, size):
            return HostMemoryFullError(
                f"{need}: it alone is larger than the budget ({self.budget}); raise "
                "--multilora-cpu-cache-gib"
            )
        return HostMemoryFullError(
            f"{need} within the budget ({self.budget}): {packs} adapters with {kept / MIB:.1f} MiB "
            "cannot be evicted now, because they are being read or copied into slots; try again, "
            "or raise --max-cpu-loras or --multilora-cpu-cache-gib"
        )
