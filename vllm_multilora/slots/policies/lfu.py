"""Least frequently used, with aging."""

from __future__ import annotations

from vllm_multilora.slots.policies.aging import AgedFrequencyPolicy


class LfuPolicy(AgedFrequencyPolicy):
    """LFU with dynamic aging (LFU-DA): every use counts one, whatever the adapter's size.

    Source: Arlitt, Cherkasova, Dilley, Friedrich and Jin, "Evaluating content management
    techniques for Web proxy caches", ACM SIGMETRICS Performance Evaluation Review 27(4), 2000.
    """

    def weight(self, size: int, cost: float) -> float:
        return 1.0
