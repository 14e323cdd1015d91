"""Slots and host memory in given situations, for the tests."""

from collections.abc import Callable, Iterable
from typing import Any

from vllm_multilora.slots.assignment import Assignment, SlotAssignment
from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.events import SlotEvents, Tier
from vllm_multilora.slots.policies.policy import CachePolicy
from vllm_multilora.slots.policies.policy_registry import make_policy
from vllm_multilora.slots.simulation.host_tier import HostTier

MIB = 2**20


def make_slots(
    slots: int = 2, policy: str | Callable[[], CachePolicy] = "lru", **options: Any
) -> SlotAssignment:
    own = make_policy(policy) if isinstance(policy, str) else policy()
    return SlotAssignment(slots, own, **options)


def make_host(
    *, adapters: int | None = None, size: int | None = None, policy: str = "lru", packs: Any = ()
) -> HostTier:
    """Host memory with these packs, of one MiB each."""
    host = HostTier(make_policy(policy), CpuBudget(adapters, size))
    for pack in packs:
        host.take(pack, MIB)
    return host


def bring(slots: SlotAssignment, adapter_id: int, pack: int = 1) -> Assignment | None:
    """Assigns an adapter and fills its slot."""
    assignment = slots.assign(adapter_id, pack)
    if assignment is not None:
        slots.filled(assignment.order)
    return assignment


def run(slots: SlotAssignment, *batches: Iterable[int]) -> None:
    """Runs batches, one after the other, for two steps each; whoever has no slot gets one."""
    for batch in map(frozenset, batches):
        for adapter_id in sorted(batch):
            if not slots.admit(adapter_id, 1):
                bring(slots, adapter_id)
                assert slots.admit(adapter_id, 1), f"no slot could be spared for {adapter_id}"
        slots.running(batch)
        slots.running(batch)


class Journal(SlotEvents):
    """Events in words, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def hit(self, tier: Tier, adapter_id: int) -> None:
        self.seen.append(f"hit {tier.value} {adapter_id}")

    def miss(self, tier: Tier, adapter_id: int) -> None:
        self.seen.append(f"miss {tier.value} {adapter_id}")

    def assigned(self, adapter_id: int, slot: int) -> None:
        self.seen.append(f"assigned {adapter_id} to {slot}")

    def filled(self, adapter_id: int, slot: int) -> None:
        self.seen.append(f"filled {slot} with {adapter_id}")

    def evicted(self, tier: Tier, adapter_id: int) -> None:
        self.seen.append(f"evicted {tier.value} {adapter_id}")

    def left(self, adapter_id: int, slot: int) -> None:
        self.seen.append(f"left {slot}: {adapter_id}")

    def take(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen

    def look_ups(self) -> list[str]:
        return [word for word in self.take() if word.startswith(("hit", "miss"))]
