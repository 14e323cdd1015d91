"""How long a step takes, by what is in its batch: a sum of terms, each 0 or more.

A step has a fixed part (the model's weights are read once, and Python runs through its layers), a
part for each token of a prompt, which grows with their number, since caches hold less of a larger
step, one for each request that gets a token, and two parts for attention: one for each pair of
tokens of a prompt, and one for each token of a context that is read for another token. Adapters add
a fixed part for their kernels, a part for reading their matrices once each, and a part for
multiplying each of their tokens; both are proportional to the adapter's bytes, and so to its rank.
Prompts add a fixed part, since other kernels compute them than single tokens, and one for each
request that generates beside them. Loads beside a step take processor time from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import mul

from vllm_multilora.slots.budget import MIB

TERMS = (
    "step",
    "prompts_at_all",
    "prompt_token",
    "prompt_token_squared",
    "generated_token",
    "prompt_pair",
    "context_token",
    "adapters_at_all",
    "adapter_mib",
    "adapted_token",
    "adapted_token_mib",
    "row_beside_prompts",
    "load_beside",
)
"""What a step's time is a sum of, in the order of `StepBatch.amounts`."""

RANGED = ("prompt_tokens", "rows", "prompt_pairs", "context_tokens", "adapter_bytes")
"""Attributes of `StepBatch` of which a calibration says how much was measured."""


@dataclass(frozen=True)
class StepBatch:
    """What a step computes.

    Attributes:
        rows: Requests that get a token.
        prompt_pairs: For each of the prompts' tokens, those that attention looks at; summed.
        context_tokens: Tokens of the contexts of requests that generate, the new ones included.
        adapter_bytes: Of the adapters in the batch, each counted once.
        adapted_token_bytes: The bytes of its adapter for each of them, summed.
    """

    prompt_tokens: int = 0
    rows: int = 0
    prompt_pairs: float = 0
    context_tokens: int = 0
    adapter_bytes: int = 0
    adapted_tokens: int = 0
    adapted_token_bytes: float = 0
    is_loading: bool = False

    @property
    def amounts(self) -> tuple[float, ...]:
        """How much of each of `TERMS` there is."""
        return (
            1.0,
            self.prompt_tokens > 0,
            self.prompt_tokens,
            self.prompt_tokens**2,
            self.rows,
            self.prompt_pairs,
            self.context_tokens,
            self.adapter_bytes > 0,
            self.adapter_bytes / MIB,
            self.adapted_tokens,
            self.adapted_token_bytes / MIB,
            self.rows if self.prompt_tokens and self.context_tokens else 0,
            self.is_loading,
        )


def pairs_of(tokens: int, before: int = 0) -> float:
    """Pairs that attention looks at for so many tokens of a prompt, with so many before them."""
    return tokens * before + tokens * (tokens + 1) / 2


class StepCost:
    """Seconds that steps take, from those for one of each of `TERMS`."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = tuple(seconds[term] for term in TERMS)

    def of(self, batch: StepBatch) -> float:
        """Seconds that a step with this batch takes."""
        return sum(map(mul, self._seconds, batch.amounts), 0.0)
