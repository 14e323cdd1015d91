"""How many requests use an engine core's adapters, and have used them; which adapters leave."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_multilora.integration.blends import label_of
from vllm_multilora.integration.engine.adapters.known_adapters import MAX_KNOWN

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request


@dataclass(frozen=True)
class Leaving:
    """An adapter on its way out: when its requests are ended, and what is done then."""

    number: int
    deadline: float
    limit_s: float
    then: Callable[[bool], None]


class AdapterUsers:
    """Unfinished requests, counted by their adapters' numbers; for the main thread.

    Attributes:
        accepted: All that have come so far by adapter, until it is removed.
    """

    def __init__(self) -> None:
        self.accepted: Counter[int] = Counter()
        self._counts: Counter[int] = Counter()
        self._names: dict[int, str] = {}
        self._leaving: list[Leaving] = []

    def __getitem__(self, number: int) -> int:
        return self._counts[number]

    def come(self, lora: LoRARequest) -> None:
        self.accepted[lora.lora_int_id] += 1
        self._counts[lora.lora_int_id] += 1
        self._names[lora.lora_int_id] = label_of(lora)

    def leave(self, number: int) -> bool:
        """A request has ended; whether it was the adapter's last one."""
        self._counts[number] -= 1
        if self._counts[number]:
            return False
        del self._counts[number], self._names[number]
        return True

    def retire(self, number: int, limit_s: float, then: Callable[[bool], None]) -> None:
        """An adapter is to leave: `then` is told whether it did; see `let_go` and `keep`."""
        self._leaving.append(Leaving(number, time.monotonic() + limit_s, limit_s, then))

    def let_go(self) -> list[Leaving]:
        """Lets adapters leave that no request uses; returns those whose requests must be ended."""
        leaving, self._leaving = self._leaving, []
        for each in leaving:
            if self._counts[each.number]:
                self._leaving.append(each)
            else:
                self.accepted.pop(each.number, None)
                each.then(True)
        return self.overdue

    def keep(self, numbers: Collection[int]) -> None:
        """Adapters are to be used, again where they were to leave."""
        leaving, self._leaving = self._leaving, []
        for each in leaving:
            if each.number in numbers:
                each.then(False)
            else:
                self._leaving.append(each)

    @property
    def overdue(self) -> list[Leaving]:
        """Adapters that requests use, and should not any more."""
        now = time.monotonic() if self._leaving else 0.0
        return [each for each in self._leaving if now >= each.deadline]

    def forget_accepted(self, known: Iterable[int]) -> None:
        """Forgets how many have come for adapters that are not known any more, if it is time to."""
        if len(self.accepted) > 2 * MAX_KNOWN:
            kept = {*known}
            self.accepted = Counter({i: n for i, n in self.accepted.items() if i in kept})

    def lists(self, running: Iterable[Request]) -> tuple[list[str], list[str]]:
        """The adapters with requests that run, and those with requests that wait.

        A request waits for whatever it cannot run without: a load, a slot, a turn, memory.
        """
        runs = Counter(r.lora_request.lora_int_id for r in running if r.lora_request)
        names = self._names
        waits = (number for number, count in self._counts.items() if count > runs[number])
        runs_now = (number for number in self._counts if runs[number])
        return _unique(names, runs_now), _unique(names, waits)


def _unique(names: dict[int, str], numbers: Iterable[int]) -> list[str]:
    """The names of adapters, each once: all blends have the same."""
    return list(dict.fromkeys(names[number] for number in numbers))
