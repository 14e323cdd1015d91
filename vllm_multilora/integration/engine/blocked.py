"""Adapters that no request can run with, which later steps need not ask for again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_multilora.integration.engine.entries import Entry
from vllm_multilora.slots.turns import SlotTurns

if TYPE_CHECKING:
    from vllm_multilora.integration.engine.adapters import EngineAdapters


class BlockedAdapters:
    """The adapters that steps have asked for in vain.

    To look at one here takes an eighth of the calls that it takes a step to examine a request.

    Args:
        turns: Know which adapters wait for slots, and have none to come for.

    Attributes:
        numbers: Of these adapters.
        unready: Those of them that the store has not answered for.
    """

    def __init__(self, turns: SlotTurns) -> None:
        self._turns = turns
        self.numbers: set[int] = set()
        self.unready: set[int] = set()

    def add(self, number: int) -> None:
        """No request can run with an adapter in this step."""
        self.numbers.add(number)

    def add_unready(self, entry: Entry) -> None:
        """Nor in later ones, until the store has answered."""
        self.numbers.add(entry.number)
        self.unready.add(entry.number)
        if entry.in_host and not entry.is_stale:
            self._turns.wait(entry.number)  # its lease is all that is late

    def begin_step(self, adapters: EngineAdapters) -> None:
        """Leaves those of which it would be said again that they are blocked.

        Args:
            adapters: Know what the store has answered.
        """
        before, self.numbers, self.unready = self.numbers, set(), set()
        for number in () if adapters.asks_late else before:
            entry = adapters.known().find(number)
            if entry is None or adapters.failure(number) is not None:
                continue
            if entry.is_leased and not entry.is_stale:
                if self._turns.turns_away(number):
                    self.add(number)
            elif entry.ticket is not None:
                self.add_unready(entry)
