"""What the serving tests serve: a base model, its adapters, and prompts with their true answers.

A prompt becomes a case of an adapter only if its true continuation

- has no near tie at any step: an engine that computes the same function with other rounding must
  then produce the same tokens, and the tests can ask for equality without exceptions;
- is unlike the base model's and every other adapter's: a mix-up of adapters always shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NEW_TOKENS = 12
MIN_MARGIN = 0.05
"""Least distance, in logits, between the best and the second best token of every step."""

PROMPT_LENGTHS = (1, 7, 23, 40)
"""One token; within a KV block of 32 tokens; most of one; across two."""


Prompt = tuple[int, ...]
Key = tuple[str | None, Prompt]
"""An adapter's name (None: the base model) and a prompt."""


@dataclass(frozen=True)
class Continuation:
    """One prompt's greedy continuation.

    Attributes:
        tokens: The new tokens.
        logprobs: Log-probability of each new token.
        top: Per step, the most likely tokens' log-probabilities, best first.
        margins: Per step, the best logit minus the second best.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[dict[int, float], ...]
    margins: tuple[float, ...]

    @property
    def min_margin(self) -> float:
        """The narrowest choice on the way; a small one makes the tokens depend on rounding."""
        return min(self.margins)


@dataclass(frozen=True)
class Case:
    """One request and its true answer; ``adapter`` is None for the base model."""

    adapter: str | None
    prompt: Prompt
    expected: Continuation = field(repr=False)


@dataclass(frozen=True)
class Scenario:
    """A base checkpoint, its adapters by name, and one case per adapter and prompt length."""

    base: Path
    adapters: Mapping[str, Path]
    cases: tuple[Case, ...] = field(repr=False)

    def adapter_id(self, name: str) -> int:
        """The adapter's number, from 1, as ``LoRARequest`` wants it."""
        return 1 + list(self.adapters).index(name)

    def cases_of(self, name: str | None) -> tuple[Case, ...]:
        """The cases of one adapter, or of the base model for None."""
        return tuple(case for case in self.cases if case.adapter == name)
