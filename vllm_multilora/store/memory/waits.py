"""Jobs that wait for room in host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from vllm_multilora.slots.budget import readable
from vllm_multilora.store.memory.arena import Allocation, pages_of
from vllm_multilora.store.memory.entries import Load
from vllm_multilora.store.memory.held_packs import HostMemory


class Room:
    """Who waits for room, in the order in which they asked; nobody overtakes."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._waiting: deque[Load] = deque()

    def in_vain(self) -> tuple[Load, str] | None:
        """A load that waits for more than there can be, and why; None: all may get theirs.

        There can be less than when it asked: the server with the largest budget may have gone.
        """
        for load in self._waiting:
            assert load.blocks is not None
            nbytes, budget = pages_of(load.blocks), self._memory.arena.budget
            if not self._memory.fits(1, nbytes):
                assert budget is not None, "each budget has bytes, if one adapter is too large"
                return load, (
                    f"the adapter takes {readable(nbytes)} of host memory, and all adapters "
                    f"together may take {readable(budget)}; raise the budget, or lower the "
                    "adapter's rank"
                )
        return None

    def free_now(self, load: Load) -> Allocation | None:
        """Room that nobody has to leave for, and nobody waits for, if there is memory for it."""
        assert load.blocks is not None
        if self._waiting or load.is_anew:
            return None
        return self._memory.room(load.blocks, evict=False)

    def ask(self, load: Load) -> None:
        """Stands in line."""
        self._waiting.append(load)

    def next(self) -> Load | None:
        """The first in line."""
        return self._waiting[0] if self._waiting else None

    def take(self, load: Load, loads: Iterable[Load]) -> Allocation | None:
        """Room for the first in line, for which others may leave; None: it waits on.

        What its tenant may not keep beside it, and beside all loads of it that have room, leaves
        first.
        """
        assert load.blocks is not None
        scope = load.binding.scope
        if (tenant := load.whose()) is not None:
            coming = sum(
                1
                for one in loads
                if one.allocation is not None
                and (one.whose(), one.binding.scope) == (tenant, scope)
            )
            self._memory.keep_within(scope, tenant, coming + 1)
        allocation = self._memory.room(load.blocks, evict=True)
        if allocation is not None:
            self._waiting.popleft()
            if load.is_anew:
                self._memory.vacate(allocation.held_bytes)
        return allocation

    def leave(self, load: Load) -> bool:
        """The load needs no room any more; whether it has waited for it."""
        if load not in self._waiting:
            return False
        self._waiting.remove(load)
        return True
