"""Adapters that no request can run with, which later steps need not ask for again."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection
from typing import TYPE_CHECKING

from vllm_multilora.integration.engine.adapters.adapter_machine import AdapterMachine
from vllm_multilora.slots.fairness.slot_turns import SlotTurns

if TYPE_CHECKING:
    from vllm_multilora.integration.engine.adapters.engine_adapters import EngineAdapters


_MAX_STEPS = 16  # that an engine has under way at once, and more: one, two, or a pipeline's depth


class BlockedAdapters:
    """The adapters that steps have asked for in vain.

    To look at one here takes an eighth of the calls that it takes a step to examine a request.
    """

    def __init__(self, turns: SlotTurns) -> None:
        self._turns = turns
        self.numbers: set[int] = set()
        self.unready: set[int] = set()  # those of them that the store has not answered for

    def add(self, number: int) -> None:
        self.numbers.add(number)

    def add_unready(self, entry: AdapterMachine) -> None:
        """Nor in later ones, until the store has answered."""
        self.numbers.add(entry.number)
        self.unready.add(entry.number)
        if entry.in_host and not entry.is_stale:
            self._turns.wait(entry.number)  # its lease is all that is late

    def begin_step(self, adapters: EngineAdapters) -> None:
        """Leaves those of which it would be said again that they are blocked."""
        before, self.numbers, self.unready = self.numbers, set(), set()
        for number in () if adapters.asks_late else before:
            entry = adapters.known().find(number)
            if entry is None or adapters.failure(number) is not None:
                continue
            if entry.is_leased and not entry.is_stale:
                if self._turns.turns_away(number):
                    self.add(number)
            elif entry.load is not None:
                self.add_unready(entry)


class FreedBlocks:
    """By adapter, the blocks that requests gave back since the last steps were scheduled.

    A block may be found in the prefix cache from the moment it is given to a request, before it is
    computed. Should a worker then say that it was without the request's adapter, the request may
    have been preempted, aborted or finished: its blocks are known here only. Some may be other
    requests' by now; to take such a one out of the prefix cache as well costs a hit, no more.
    """

    def __init__(self) -> None:
        self._steps: deque[defaultdict[int, set[int]]] = deque(maxlen=_MAX_STEPS)
        self.step()

    def step(self) -> None:
        """Another step is being scheduled."""
        self._steps.append(defaultdict(set))

    def note(self, adapter: int, blocks: Collection[int]) -> None:
        """A request of an adapter gives blocks back."""
        self._steps[-1][adapter].update(blocks)

    def of(self, adapters: Collection[int]) -> set[int]:
        """What requests of these adapters have given back lately."""
        return {
            block for step in self._steps for adapter in adapters for block in step.get(adapter, ())
        }
