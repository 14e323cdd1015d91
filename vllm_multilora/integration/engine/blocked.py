"""Adapters that no request can run with, which later steps need not ask for again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_multilora.slots.turns import SlotTurns

if TYPE_CHECKING:
    from vllm_multilora.integration.engine.adapters import EngineAdapters


class BlockedAdapters:
    """The adapters that steps have asked for in vain.

    To look at one here takes a sixth of the calls that it takes a step to examine a request.

    Args:
        turns: Know which adapters wait for slots.
    """

    def __init__(self, turns: SlotTurns) -> None:
        self._turns = turns
        self._numbers: set[int] = set()
        self._unready: set[int] = set()  # those of them that had not been loaded

    def __contains__(self, number: object) -> bool:
        return number in self._numbers

    @property
    def awaits_store(self) -> bool:
        """Whether one of them is blocked because it has not been loaded."""
        return bool(self._unready)

    def add(self, number: int) -> None:
        """No request can run with an adapter in this step."""
        self._numbers.add(number)

    def add_unready(self, number: int) -> None:
        """Nor in later ones, until the store has answered."""
        self._numbers.add(number)
        self._unready.add(number)

    def clear(self) -> None:
        """All adapters are asked for again."""
        self._numbers.clear()
        self._unready.clear()

    def begin_step(self, adapters: EngineAdapters, *, is_full: bool) -> None:
        """Leaves those of which it would be said again that they are blocked.

        Args:
            adapters: Know what the store has answered.
            is_full: Whether running requests have all slots, so that nobody else gets one.
        """
        if adapters.asks_late:
            self.clear()
        unready = {i for i in self._unready if _is_awaited(i, adapters)}
        turned_away = filter(self._turns.keeps_waiting, self._numbers if is_full else ())
        self._numbers = unready | {i for i in turned_away if _lacks_slot(i, adapters)}
        self._unready = unready


def _is_awaited(number: int, adapters: EngineAdapters) -> bool:
    entry = adapters.known().find(number)
    is_asked = entry is not None and entry.ticket is not None
    return is_asked and adapters.failure(number, reload=True) is None


def _lacks_slot(number: int, adapters: EngineAdapters) -> bool:
    entry = adapters.known().find(number)
    is_loaded = entry is not None and entry.is_leased and not entry.is_stale
    return is_loaded and adapters.failure(number, reload=True) is None
