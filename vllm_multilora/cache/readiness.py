"""What an engine may conclude from what its ranks say: which adapters all of them have."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_multilora.cache.load_failures import LoadFailure
from vllm_multilora.cache.readiness_events import Failed, Lost, Missed, Ready

Told = Ready | Failed | Lost | Missed
"""What counts for readiness."""


class Standing(enum.Enum):
    """What an engine knows of an adapter.

    Attributes:
        UNKNOWN: Not asked for, or some rank has lost it since: ask.
        LOADING: Asked for; some rank has not answered.
        READY: All ranks have it in host memory.
        FAILED: Some rank could not load it.
    """

    UNKNOWN = "unknown"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass
class _Asked:
    """An adapter that was asked for.

    Attributes:
        serial: The number of the newest request; older answers do not count.
        ready: The ranks that have answered it and not lost the adapter since.
        failure: The first failure that answered it.
        unsure: The ranks whose answer to it, or loss after it, may have been missed.
    """

    serial: int
    ready: set[int] = field(default_factory=set)
    failure: LoadFailure | None = None
    unsure: set[int] = field(default_factory=set)


class Readiness:
    """Which adapters all ranks have.

    Args:
        ranks: Number of ranks, at least 1.
    """

    def __init__(self, ranks: int):
        if ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {ranks}")
        self._ranks = ranks
        self._serials = itertools.count(1)
        self._asked: dict[int, _Asked] = {}

    def ask(self, adapter_id: int) -> int:
        """Begins anew: the serial number to send to all ranks with the request to load.

        Numbers ascend and are never used twice, so that no answer to an older request, from
        before a `forget` too, is taken for one to this.
        """
        asked = _Asked(next(self._serials))
        self._asked[adapter_id] = asked
        return asked.serial

    def forget(self, adapter_id: int) -> None:
        """The adapter is unknown from now, and whatever is still said of it does not count."""
        self._asked.pop(adapter_id, None)

    def state(self, adapter_id: int) -> Standing:
        """What is known of an adapter."""
        asked = self._asked.get(adapter_id)
        if asked is None:
            return Standing.UNKNOWN
        if asked.failure is not None:
            return Standing.FAILED
        return Standing.READY if len(asked.ready) == self._ranks else Standing.LOADING

    def failure(self, adapter_id: int) -> LoadFailure | None:
        """The first failure that a rank answered with; None where the state is not FAILED."""
        asked = self._asked.get(adapter_id)
        return None if asked is None else asked.failure

    def to_ask_again(self) -> list[int]:
        """Adapters of which an answer may have been missed, ascending: ask for them again.

        Until then they count as loading, also those that were ready: a loss may have been missed.
        Only a `Missed` in `update` adds to them.
        """
        return sorted(adapter_id for adapter_id, asked in self._asked.items() if asked.unsure)

    def update(self, drained: Iterable[tuple[int, Told]]) -> set[int]:
        """Takes in what ranks have said, in order; the adapters whose state is another now."""
        before: dict[int, Standing] = {}
        for rank, event in drained:
            if not 0 <= rank < self._ranks:
                raise ValueError(f"rank must be 0 to {self._ranks - 1}, got {rank} with {event}")
            concerned = list(self._asked) if isinstance(event, Missed) else [event.adapter_id]
            for adapter_id in concerned:
                before.setdefault(adapter_id, self.state(adapter_id))
                self._apply(rank, event, adapter_id)
        return {adapter_id for adapter_id, old in before.items() if self.state(adapter_id) != old}

    def _apply(self, rank: int, event: Told, adapter_id: int) -> None:
        asked = self._asked.get(adapter_id)
        if asked is None:
            return
        if isinstance(event, Missed):
            asked.ready.discard(rank)
            if asked.failure is None:
                asked.unsure.add(rank)
        elif isinstance(event, Lost):
            # A rank that has not answered yet speaks of before the request, and will answer.
            if rank in asked.ready and asked.failure is None:
                del self._asked[adapter_id]
        elif event.serial == asked.serial:
            if isinstance(event, Ready):
                asked.ready.add(rank)
                asked.unsure.discard(rank)
            elif isinstance(event, Failed) and asked.failure is None:
                asked.failure = event.failure
                asked.unsure.clear()
