"""Frequency with aging: least frequently used, and greedy dual size with frequency."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence

from vllm_multilora.slots.policies.policy import CachePolicy


class AgedFrequencyPolicy(CachePolicy):
    """Gives up the adapter with the lowest key `age at last use + frequency * weight`.

    The age is the highest key of any victim so far. It starts every later use higher, so that
    adapters that were popular once sink below those in use now, without any decay over time.
    Frequencies are counted while an adapter is in the tier.
    """

    def __init__(self) -> None:
        self._age = 0.0
        self._age_at_use: dict[int, float] = {}
        self._frequency: Counter[int] = Counter()
        self._weight: dict[int, float] = {}

    @abstractmethod
    def weight(self, size: int, cost: float) -> float:
        """What one use of an adapter of this size and cost counts."""

    def added(self, adapter_id: int, size: int, cost: float) -> None:
        self._age_at_use[adapter_id] = self._age
        self._weight[adapter_id] = self.weight(size, cost)

    def used(self, adapter_ids: Sequence[int], joined: Sequence[int]) -> None:
        self._frequency.update(adapter_ids)
        self._age_at_use.update(dict.fromkeys(adapter_ids, self._age))

    def removed(self, adapter_id: int) -> None:
        del self._age_at_use[adapter_id], self._frequency[adapter_id], self._weight[adapter_id]

    def victim(self, candidates: Sequence[int]) -> int:
        chosen = min(candidates, key=self._key)
        self._age = max(self._age, self._key(chosen))
        return chosen

    def _key(self, adapter_id: int) -> float:
        use = self._frequency[adapter_id] * self._weight[adapter_id]
        return self._age_at_use[adapter_id] + use


class LfuPolicy(AgedFrequencyPolicy):
    """LFU with dynamic aging (LFU-DA): every use counts one, whatever the adapter's size.

    Source: Arlitt, Cherkasova, Dilley, Friedrich and Jin, "Evaluating content management
    techniques for Web proxy caches", ACM SIGMETRICS Performance Evaluation Review 27(4), 2000.
    """

    def weight(self, size: int, cost: float) -> float:
        return 1.0


class GdsfPolicy(AgedFrequencyPolicy):
    """GDSF: a use counts its reload cost by the room taken, `frequency * cost / size`.

    Keeps many small adapters rather than few large ones where their use is alike, for the hit
    rate over requests. In the GPU tier, where every adapter takes one slot, it is LFU-DA.

    Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching
    policy", HP Laboratories HPL-98-69R1, 1998; after Cao and Irani, "Cost-aware WWW proxy caching
    algorithms", USENIX Symposium on Internet Technologies and Systems, 1997.
    """

    def weight(self, size: int, cost: float) -> float:
        return cost / size
