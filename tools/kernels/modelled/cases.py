"""Batches whose layer calls are modelled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tools.kernels.measure.batches import MIXED_RANKS

SLOTS, ITEM = 64, 2
"""Adapter slots of the modelled servers, and bytes of a value."""

TOKENS, ADAPTERS = (1, 8, 32, 64), (1, 8, 64)
RANKS = {16: ("8", "16"), 64: ("8", "16", "64", "mixed"), 256: ("16", "64", "256", "mixed")}
"""By maximum rank of the server, the ranks of its adapters."""


@dataclass(frozen=True)
class Batch:
    """Tokens that are shared out evenly among adapters.

    Attributes:
        tokens: Rows of x.
        adapters: Of different slots.
        ranks: A number, or `mixed`: `MIXED_RANKS` in turn.
        max_rank: Rank that the server's slots have memory for.
    """

    tokens: int
    adapters: int
    ranks: str
    max_rank: int = 64

    def rank_of_each(self) -> list[int]:
        own = MIXED_RANKS if self.ranks == "mixed" else (int(self.ranks),)
        return [own[i % len(own)] for i in range(self.adapters)]

    @property
    def rows(self) -> float:
        """Tokens of each adapter."""
        return self.tokens / self.adapters


def cases(max_rank: int) -> Iterator[Batch]:
    """All batches of a server's table."""
    for tokens in TOKENS:
        for adapters in ADAPTERS:
            if adapters <= tokens:
                for ranks in RANKS[max_rank]:
                    yield Batch(tokens, adapters, ranks, max_rank)
