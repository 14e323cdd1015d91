"""Adapters that were refused recently, and when each may be tried again."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_multilora.integration.attached import Attached

REFUSALS: Attached[Refusals] = Attached("refusals")
"""Adapters that vLLM's resolvers found and the engine refused, by `OpenAIServingModels`."""

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
_LIMIT = 1024


def next_pause(pause_s: float) -> float:
    """The pause after another failure: twice as long, up to a minute."""
    return min(2 * pause_s, LONGEST_PAUSE_S)


class _Refusal(NamedTuple):
    answer: ErrorResponse
    pause_s: float
    until: float


class Refusals:
    """Answers that are given again until it is time for another try.

    Each try costs a check, and whoever is refused may ask as often as they like. So pauses double,
    from two seconds to a minute. The last thousand are remembered.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refusals: OrderedDict[Hashable, _Refusal] = OrderedDict()

    def __len__(self) -> int:
        return len(self._refusals)

    def find(self, adapter: Hashable) -> ErrorResponse | None:
        """What answers a request for an adapter now; None: it may be tried."""
        refusal = self._refusals.get(adapter)
        return refusal.answer if refusal and self._clock() < refusal.until else None

    def last(self, adapter: Hashable) -> ErrorResponse | None:
        """Why an adapter was refused last, whether it may be tried again by now or not."""
        refusal = self._refusals.get(adapter)
        return refusal.answer if refusal else None

    def remember(self, adapter: Hashable, answer: ErrorResponse) -> None:
        before = self._refusals.pop(adapter, None)
        pause_s = next_pause(before.pause_s) if before else FIRST_PAUSE_S
        self._refusals[adapter] = _Refusal(answer, pause_s, self._clock() + pause_s)
        if len(self._refusals) > _LIMIT:
            self._refusals.popitem(last=False)

    def forget(self, adapter: Hashable) -> None:
        self._refusals.pop(adapter, None)
