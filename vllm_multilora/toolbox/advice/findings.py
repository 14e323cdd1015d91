"""What to change about a server, and why."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class FindingCode(enum.StrEnum):
    """What kind of advice a finding is; programs may rely on the values."""

    MAX_LORAS_LOW = "max-loras-low"
    MAX_LORAS_HIGH = "max-loras-high"
    EVICTIONS = "evictions"
    CPU_TIER_SMALL = "cpu-tier-small"
    SLOW_LOADS = "slow-loads"
    FAILING_LOADS = "failing-loads"
    MERGE = "merge"
    COLD = "cold"
    MAX_RANK_HIGH = "max-rank-high"
    LARGE_RANK = "large-rank"


@dataclass(frozen=True)
class Finding:
    """One thing to change.

    Attributes:
        change: What to do.
        rule: The rule that what was seen breaks.
        snippet: Code or commands that do it; empty where there are none.
    """

    code: FindingCode
    change: str
    seen: str
    rule: str
    snippet: str = ""

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.change}", f"  seen  {self.seen}", f"  rule  {self.rule}"]
        lines += [f"    {line}".rstrip() for line in self.snippet.splitlines()]
        return "\n".join(lines)
