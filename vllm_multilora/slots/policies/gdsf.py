"""Greedy dual size with frequency."""

from __future__ import annotations

from vllm_multilora.slots.policies.aging import AgedFrequencyPolicy


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
