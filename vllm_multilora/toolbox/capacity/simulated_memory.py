"""Host memory and the loads into it, in simulated time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.policies.policy import CachePolicy
from vllm_multilora.slots.simulation.host_tier import HostTier
from vllm_multilora.toolbox.capacity.calibration import LoadCosts

READ_AT_ONCE = MultiLoRAConfig.loader_threads
"""Loads of a server (`--multilora-loader-threads`)."""

_ROUNDING_S = 1e-9


class SimulatedMemory:
    """Adapters in host memory and those on their way there, as the store has them.

    Loads begin in the order in which they were asked for, a few at a time, and share what one alone
    would get of the machine. An adapter is on lease from when it was read until it has been copied
    into its slot, or nobody waits for it any more.

    Args:
        costs: What a load takes; None if nothing ever has to be loaded.

    Attributes:
        used: Tells the adapters of the running batch to the policy, when they have changed.
        loads: Loads that have begun.
    """

    def __init__(
        self, policy: CachePolicy, budget: CpuBudget, sizes: Sequence[int], costs: LoadCosts | None
    ) -> None:
        self._tier = HostTier(policy, budget)
        self._sizes = sizes
        self._costs = costs
        self._queue: deque[int] = deque()
        self._left: dict[int, float] = {}  # adapters being read: the share of each that remains
        self._leased: set[int] = set()
        self.used = self._tier.used
        self.loads = 0

    def __contains__(self, adapter: int) -> bool:
        """Whether the adapter is there, read."""
        return adapter in self._tier and adapter not in self._left

    @property
    def is_loading(self) -> bool:
        return bool(self._left)

    @property
    def next_s(self) -> float:
        """Seconds until a load ends if the engine stays idle; infinite without loads."""
        return min(map(self._needed, self._left), default=float("inf"))

    def request_load(self, adapter: int) -> None:
        """Has an adapter read that is neither there nor requested already; leases one that is."""
        if adapter in self:
            self._leased.add(adapter)
        elif adapter not in self._left and adapter not in self._queue:
            self._queue.append(adapter)
            self._begin()

    def release(self, adapter: int) -> None:
        """Ends the lease of an adapter, if it has one."""
        self._leased.discard(adapter)
        self._begin()

    def advance(self, seconds: float, *, computing: bool) -> None:
        """So many seconds pass, in which the engine computes or is idle."""
        while self._left:
            needed = {adapter: self._needed(adapter, computing=computing) for adapter in self._left}
            first = min(needed, key=needed.__getitem__)
            passed = min(seconds, needed[first])
            for adapter, whole in needed.items():
                self._left[adapter] *= 1 - passed / max(whole, _ROUNDING_S)
            seconds -= passed
            if needed[first] > passed + _ROUNDING_S:
                break
            del self._left[first]
            self._leased.add(first)
            self._begin()

    def _needed(self, adapter: int, *, computing: bool = False) -> float:
        """Seconds until a load ends, if nothing changes."""
        assert self._costs is not None
        alone = self._costs.seconds(self._sizes[adapter], computing=computing)
        return self._left[adapter] * alone * len(self._left)

    def _begin(self) -> None:
        while self._queue and len(self._left) < READ_AT_ONCE:
            adapter = self._queue[0]
            leased = self._left.keys() | self._leased
            if self._tier.take(adapter, self._sizes[adapter], leased) is None:
                return  # until a lease ends
            self._queue.popleft()
            self.loads += 1
            self._left[adapter] = 1.0
