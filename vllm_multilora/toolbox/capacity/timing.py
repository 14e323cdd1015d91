"""The server that is being measured, and how its answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from vllm_multilora.toolbox.capacity.calibration import CalibrationError
from vllm_multilora.toolbox.clients.completions import Answer, Ask
from vllm_multilora.wording import counted

SHORT_PROMPT, STREAMS = 16, 4
"""Tokens of a prompt where it does not matter, and requests beside which something is timed."""


class TimedClient(Protocol):
    """Asks the server; `operations.completions.Completions` does."""

    def together(self, asks: Sequence[Ask]) -> list[Answer]: ...

    def beside(
        self, asks: Sequence[Ask], late: Sequence[Sequence[Ask]]
    ) -> tuple[list[Answer], list[list[Answer]]]: ...


@dataclass(frozen=True)
class Adapter:
    """An adapter as the server lists it.

    Attributes:
        name: Its name.
        state: One of `states.AdapterState`, as text.
        bytes: In host memory; 0 if it is not there.
    """

    name: str
    state: str
    bytes: int


@dataclass(frozen=True)
class ServerLimits:
    """Limits of the server's scheduler, as in `calibration.Settings`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True)
class Timed:
    """A server that nobody else asks.

    Attributes:
        client: Asks it.
        model: The base model's name.
        limits: Its own.
    """

    client: TimedClient
    model: str
    limits: ServerLimits

    def alone(self, model: str, prompt: int, times: int) -> list[float]:
        """Seconds to the first tokens of requests one after another."""
        asks = [Ask(model, prompt, 1)] * times
        return [self.client.together([ask])[0].first_token_s for ask in asks]

    def beside(
        self, models: Sequence[str], late: Sequence[Sequence[Ask]]
    ) -> tuple[list[Answer], list[list[Answer]]]:
        """Requests for these models that generate, and others beside them, lot after lot."""
        longest = self.limits.max_model_len - SHORT_PROMPT - 1
        answers = self.client.beside([Ask(m, SHORT_PROMPT, longest) for m in models], late)
        self.client.together([Ask(self.model, SHORT_PROMPT, 1)])  # until the first ones have ended
        return answers


def steps_of(answers: Sequence[Answer]) -> list[tuple[float, float]]:
    """When each step began and ended in which all of the requests got a token.

    Raises:
        CalibrationError: There is none.
    """
    last = max(answers, key=lambda answer: answer.tokens_s[0])
    end = min(answer.tokens_s[-1] for answer in answers)
    times = sorted(set(last.tokens_s))
    steps = [(a, b) for a, b in pairwise(times) if b <= end]
    if not steps:
        raise CalibrationError(
            f"{counted(len(answers), 'request')} sent together got no tokens in the same steps: "
            "the server has other traffic, or runs fewer at once than --max-num-seqs says"
        )
    return steps
