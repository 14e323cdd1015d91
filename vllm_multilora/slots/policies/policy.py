"""What a cache policy is: told of uses, asked for victims.

Each tier has its own instance. A policy sees logical time only, the order of the calls, so that
whoever replays the calls of a server decides as the server did.

What counts as a use: a step of the engine. Steps with the same adapters as the step before are
not reported: an adapter of the running batch is never a candidate, and a hundred decoding steps
of one request say no more about the future than one (the correlated references of O'Neil,
O'Neil and Weikum, "The LRU-K page replacement algorithm", SIGMOD 1993). For policies that order
by recency this changes no decision, because a repeated step changes no order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.slots.budget import MIB

FIXED_PART_BYTES = 8 * MIB
"""What is read in the time that a load takes whatever its size: opening, parsing, checking.

A constant of the right order: for adapters of 448 tensors, 10 to 160 MiB, in the page cache of a
shared two-core machine, it came to between 6 and 15 MiB. It is not measured where it is used,
because times differ between ranks, and so would their victims.
"""


class PolicyError(MultiLoRAError, ValueError):
    """A policy does not exist, lacks a method or chose no candidate; the message says which."""


def reload_cost(size: int) -> float:
    """Cost of loading `size` bytes, in loads of an empty adapter."""
    return 1.0 + size / FIXED_PART_BYTES


class CachePolicy(ABC):
    """Chooses which adapter leaves a tier; made without arguments.

    A class that has these methods without deriving from this one is taken as well. Only adapters
    between their `added` and their `removed` are ever reported or offered.
    """

    @abstractmethod
    def added(self, adapter_id: int, size: int, cost: float) -> None:
        """The adapter has entered the tier, not yet used there.

        Args:
            adapter_id: The adapter; in the CPU tier every version of one has a number of its own.
            size: What it takes of the tier: bytes in the CPU tier, 1 (slot) in the GPU tier.
            cost: What bringing it back would cost, in a unit of its own.
        """

    @abstractmethod
    def used(self, adapter_ids: Sequence[int], joined: Sequence[int]) -> None:
        """A step uses these adapters of the tier, all at the same logical instant.

        Called once per adapter and step, for steps that differ from the one before. An adapter
        that enters the tier for the step is reported by a second call, after the step's victims.

        Args:
            adapter_ids: The step's adapters in this tier, ascending.
            joined: Those of them that the preceding step did not have, ascending.
        """

    @abstractmethod
    def removed(self, adapter_id: int) -> None:
        """The adapter has left the tier: as a victim, unloaded, or because weights were lost."""

    @abstractmethod
    def victim(self, candidates: Sequence[int]) -> int:
        """The adapter to give up; it is removed before anything else is reported.

        Args:
            candidates: At least one adapter of the tier, ascending; ties go to the first.
        """


class PolicyTier:
    """Keeps a policy's view of one tier exact; the base of both tiers.

    A step's adapters are reported as used once each: those in the tier when the step is
    told, the others when they have entered.
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
        """The policy's choice among adapters of the tier, ascending; `PolicyError`: it is none."""
        victim = self._policy.victim(candidates)
        if victim not in candidates:
            raise PolicyError(
                f"cache policy {type(self._policy).__name__} chose {victim!r} as victim; it must "
                f"choose one of the candidates {list(candidates)}"
            )
        return victim
