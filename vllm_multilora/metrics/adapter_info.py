"""Encodes what `vllm:lora_adapter_info` says about an adapter as one number.

A file is written anew to take a series out of it, and an adapter's tier changes all the time. So
the file has one number for each adapter, and whoever reads it makes labels of it.
"""

from __future__ import annotations

from dataclasses import dataclass

TIERS = ("disk", "cpu", "gpu")


@dataclass(frozen=True)
class AdapterInfo:
    """Facts that are labels.

    Attributes:
        tier: The fastest place that holds the adapter.
        rank: The highest rank in it.
        pinned: Whether it keeps its place.
    """

    tier: str
    rank: int
    pinned: bool

    def encode(self) -> float:
        """As a positive number."""
        return float(1 + TIERS.index(self.tier) + 4 * self.pinned + 8 * self.rank)

    @classmethod
    def decode(cls, number: float) -> AdapterInfo | None:
        """From the number; None from 0, which stands for an adapter that is not known any more."""
        if number < 1:
            return None
        code = int(number) - 1
        return cls(TIERS[code % 4], code // 8, bool(code % 8 // 4))

    def labels(self) -> dict[str, str]:
        """As the metric's labels."""
        return {
            "tier": self.tier,
            "rank": str(self.rank),
            "pinned": "true" if self.pinned else "false",
        }
