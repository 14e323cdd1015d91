"""KV cache blocks that requests gave back while their steps were still running."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection

_MOST_STEPS = 16  # that an engine has under way at once, and more: one, two, or a pipeline's depth


class FreedBlocks:
    """By adapter, the blocks that requests gave back since the last steps were scheduled.

    A block may be found in the prefix cache from the moment it is given to a request, before it is
    computed. Should a worker then say that it was without the request's adapter, the request may
    have been preempted, aborted or finished: its blocks are known here only. Some may be other
    requests' by now; to take such a one out of the prefix cache as well costs a hit, no more.
    """

    def __init__(self) -> None:
        self._steps: deque[defaultdict[int, set[int]]] = deque(maxlen=_MOST_STEPS)
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
